"""The demo's tokenizer, and what its tokens cost without any context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory.conditions import Ids, encode
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


def unigram_loss(tokenizer: Any, streams: Sequence[Ids], held_out: Sequence[Document]) -> float:
    """Held-out cross-entropy of the training streams' token frequencies, nats a token.

    What a model that ignores all context could reach: add-one smoothed frequencies, every stream
    weighing the same, as in training.

    Args:
        tokenizer: The tokenizer of the streams.
        streams: Ids of each training text, int64 [N].
        held_out: Documents to predict.
    """
    size = len(tokenizer)
    share: NDArray[np.float64] = np.zeros(size)
    for stream in streams:
        share += np.bincount(stream, minlength=size) / len(stream)
    num_tokens = sum(len(stream) for stream in streams)
    counts = share / len(streams) * num_tokens + 1
    ids = encode(tokenizer, [document.text for document in held_out])
    return float(-np.log(counts / counts.sum())[ids].mean())


def _head(documents: tuple[Document, ...], max_chars: int) -> Iterator[str]:
    for document in documents:
        if max_chars <= 0:
            return
        yield document.text[:max_chars]
        max_chars -= len(document.text)
