"""The zoo's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dodoco_ext.observatory.corpus import Corpus, Document, num_chars

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(corpora: dict[str, Corpus], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of the training sides, each corpus contributing equally many characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    share = min(num_chars(corpus.train) for corpus in corpora.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for corpus in corpora.values() for text in _head(corpus.train, share)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _head(documents: tuple[Document, ...], max_chars: int) -> Iterator[str]:
    for document in documents:
        if max_chars <= 0:
            return
        yield document.text[:max_chars]
        max_chars -= len(document.text)
