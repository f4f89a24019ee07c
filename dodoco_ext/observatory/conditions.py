"""Data conditions: what a model is fed while its routing is recorded, all at the same number of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.data import Text, load_data

Kind = Literal["mock", "control", "real"]
Ids = NDArray[np.int64]

DEFAULT_TEXT = "builtin:prose"
"""What mock-unigram draws from when no real text is among the sources."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    all_special_ids: list[int]
    pad_token_id: int | None
    eos_token_id: int | None
    bos_token_id: int | None

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Token ids to feed, and where they come from.

    Attributes:
        name: Short label, unique within a run.
        kind: `mock` (made up), `control` (real tokens, order destroyed) or `real`.
        source: The SOURCE it was built from, without folders.
        description: One phrase on what the ids are.
        ids: int64 [num_sequences, sequence_length].
    """

    name: str
    kind: Kind
    source: str
    description: str
    ids: Ids

    @property
    def sha256(self) -> str:
        """Digest of the ids as little-endian int64."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Shape:
    """How much every condition feeds.

    Attributes:
        batch_size: Sequences a pass.
        sequence_length: Tokens a sequence.
        num_batches: Passes a condition; at least 2, since intervals compare passes.
    """

    batch_size: int
    sequence_length: int
    num_batches: int

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("sequence_length", 2), ("num_batches", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: give {least} or more")

    @property
    def num_sequences(self) -> int:
        """Sequences a condition."""
        return self.batch_size * self.num_batches

    @property
    def num_tokens(self) -> int:
        """Tokens a condition."""
        return self.num_sequences * self.sequence_length


class ConditionBuilder:
    """Builds conditions of one shape for one tokenizer.

    A text's sequences depend on the seed and the text alone, so that `mock-unigram:X` and
    `shuffled:X` consist of exactly the tokens that condition `X` feeds.

    Args:
        tokenizer: The model's tokenizer.
        shape: Tokens a condition.
        seed: Seed of every random choice.
    """

    def __init__(self, tokenizer: Tokenizer, shape: Shape, seed: int) -> None:
        self.tokenizer = tokenizer
        self.shape = shape
        self.seed = seed
        self._texts: dict[str, Text] = {}
        self._sequences: dict[str, Ids] = {}

    def build(self, sources: Sequence[str]) -> list[Condition]:
        """One condition a source, in the given order.

        Raises:
            InputError: A source is unknown, given twice, empty or too short.
        """
        if not sources:
            raise InputError("no data given: add at least one --data SOURCE")
        for source in sources:
            if sources.count(source) > 1:
                raise InputError(f"--data {source} is given twice: give each source once")
        real = [s for s in sources if not s.startswith(("mock-", "shuffled:"))]
        conditions = [self._condition(source, (real or [DEFAULT_TEXT])[0]) for source in sources]
        names = [condition.name for condition in conditions]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two sources are called {name!r}: rename one of the files")
        return conditions

    def _condition(self, source: str, default_text: str) -> Condition:
        kind, _, argument = source.partition(":")
        label = _label(argument or default_text)
        if source == "mock-uniform":
            what = "every id drawn uniformly from the tokenizer's ordinary tokens"
            return Condition("uniform mock", "mock", source, what, self._uniform())
        if source == "mock-repeat":
            token = self._repeated_token()
            ids = np.full((self.shape.num_sequences, self.shape.sequence_length), token, np.int64)
            return Condition("repeated token", "mock", source, f"token {token} throughout", ids)
        if kind == "mock-unigram":
            what = f"the tokens of {label}, dealt out at random over all sequences"
            ids = self._dealt(argument or default_text)
            return Condition("unigram mock", "mock", f"mock-unigram:{label}", what, ids)
        if kind == "shuffled":
            if not argument:
                raise InputError("shuffled: lacks its text: write shuffled:SOURCE")
            what = f"the sequences of {label}, each with its tokens in random order"
            return Condition(
                f"shuffled {_short(label)}",
                "control",
                f"shuffled:{label}",
                what,
                self._shuffled(argument),
            )
        if source.startswith("mock-"):
            raise InputError(
                f"unknown mock {source!r}: give mock-uniform, mock-unigram or mock-repeat"
            )
        text = self._text(source)
        return Condition(
            _short(text.name), "real", text.name, text.description, self._windows(source)
        )

    def _rng(self, purpose: str) -> np.random.Generator:
        # A stream of its own for each purpose: adding a condition leaves the others as they were.
        digest = hashlib.sha256(purpose.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])

    def _text(self, source: str) -> Text:
        if source not in self._texts:
            self._texts[source] = load_data(source)
        return self._texts[source]

    def _windows(self, source: str) -> Ids:
        """Non-overlapping windows of a text, chosen at random, in random order [N, T]."""
        if source not in self._sequences:
            ids = encode(self.tokenizer, self._text(source).documents)
            length, needed = self.shape.sequence_length, self.shape.num_sequences
            available = len(ids) // length
            if available < needed:
                fitting = available // self.shape.batch_size
                raise InputError(
                    f"{source} gives {len(ids):,} tokens, and {self.shape.num_tokens:,} are needed: "
                    "give a longer text" + (f", or --num-batches {fitting}" if fitting >= 2 else "")
                )
            chosen = self._rng(f"windows:{_label(source)}").permutation(available)[:needed]
            self._sequences[source] = ids[: available * length].reshape(available, length)[chosen]
        return self._sequences[source]

    def _uniform(self) -> Ids:
        special = set(self.tokenizer.all_special_ids)
        valid = sorted(set(self.tokenizer.get_vocab().values()) - special)
        size = (self.shape.num_sequences, self.shape.sequence_length)
        return self._rng("uniform").choice(np.array(valid, dtype=np.int64), size=size)

    def _repeated_token(self) -> int:
        tokenizer = self.tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _dealt(self, source: str) -> Ids:
        windows = self._windows(source)
        return (
            self._rng(f"unigram:{_label(source)}")
            .permutation(windows.ravel())
            .reshape(windows.shape)
        )

    def _shuffled(self, source: str) -> Ids:
        return self._rng(f"shuffled:{_label(source)}").permuted(self._windows(source), axis=1)


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Ids:
    """Ids of the documents one after another, separated by the end-of-text token if there is one [N]."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [tokenizer.encode(text, add_special_tokens=False) + separator for text in documents]
    return np.array([token for part in parts for token in part], dtype=np.int64)


def _label(source: str) -> str:
    """A source without folders: reports must not carry machine paths."""
    return source if source.startswith(("builtin:", "hf:")) else Path(source).name


def _short(label: str) -> str:
    return label.removeprefix("builtin:").removeprefix("hf:")
