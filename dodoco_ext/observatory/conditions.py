"""Data conditions: what a model is fed while its routing is recorded, all at the same number of tokens.

Kinds that are made rather than read have an entry in `KINDS`; `register()` adds another. Whatever
is no such kind is the name of a real text (`data.load_data`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

GRID = (
    "mock-uniform",
    "mock-unigram:packaged:english",
    "shuffled:packaged:english",
    "packaged:english",
    "packaged:dialogue",
    "packaged:bulgarian",
)
"""The default grid: mock ids, two steps from them to English prose, turns of speech, and a language of
which the zoo's training saw next to nothing."""


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
        bos: Every sequence begins with the tokenizer's token for that, in place of its first.
        padding: Positions at the end of every sequence that hold the padding token and are masked
            from attention; a router sees them like any other, and they are counted.
        first_position: The first position of every sequence is counted too.
    """

    batch_size: int
    sequence_length: int
    num_batches: int
    bos: bool = False
    padding: int = 0
    first_position: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("sequence_length", 2), ("num_batches", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: give {least} or more")
        if not 0 <= self.padding <= self.sequence_length - 2:
            raise InputError(
                f"padding={self.padding}: give 0 to {self.sequence_length - 2}, two less than a "
                "sequence is long"
            )

    @property
    def num_sequences(self) -> int:
        """Sequences a condition."""
        return self.batch_size * self.num_batches

    @property
    def num_tokens(self) -> int:
        """Tokens a condition."""
        return self.num_sequences * self.sequence_length


@dataclass(frozen=True)
class Subject:
    """What some conditions need of the model that they are fed to.

    Attributes:
        embedding_rows: Rows of its embedding, which may be more than the tokenizer has ids.
        continue_text: Continues prompts [N, P] by that many tokens, drawn with a seed: ids [N, P + n].
    """

    embedding_rows: int
    continue_text: Callable[[Ids, int, int], Ids]


class ConditionBuilder:
    """Builds conditions of one shape for one tokenizer.

    A text's sequences depend on the seed and the text alone, so that `mock-unigram:X` and
    `shuffled:X` consist of exactly the tokens that condition `X` feeds.

    Args:
        tokenizer: The model's tokenizer.
        shape: Tokens a condition.
        seed: Seed of every random choice.
        subject: The model, for the conditions that need one.
        draw: Number of this draw, where several are made with one seed. Draws share no sequence of
            a text, and nothing else that is random.
        num_draws: How many are made; a text must be long enough for all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shape: Shape,
        seed: int,
        subject: Subject | None = None,
        *,
        draw: int = 0,
        num_draws: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.shape = shape
        self.seed = seed
        self.subject = subject
        self.draw = draw
        self.num_draws = num_draws
        self.default_text = DEFAULT_TEXT
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
        real = [
            s for s in sources if not s.startswith("mock-") and s.partition(":")[0] not in KINDS
        ]
        self.default_text = (real or [DEFAULT_TEXT])[0]
        conditions = [self._dressed(self._condition(source)) for source in sources]
        names = [condition.name for condition in conditions]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two sources are called {name!r}: rename one of the files")
        return conditions

    def _condition(self, source: str) -> Condition:
        kind, _, argument = source.partition(":")
        if kind in KINDS:
            return KINDS[kind](self, argument)
        if source.startswith("mock-"):
            mocks = ", ".join(name for name in KINDS if name.startswith("mock-"))
            raise InputError(f"unknown mock {source!r}: give one of {mocks}")
        text = self._text(source)
        return Condition(
            _short(text.name), "real", text.name, text.description, self.windows(source)
        )

    def _dressed(self, condition: Condition) -> Condition:
        """The condition with the first and the last positions as `shape` wants them."""
        shape, ids = self.shape, condition.ids
        if not shape.bos and not shape.padding:
            return condition
        ids = ids.copy()
        if shape.bos:
            if self.tokenizer.bos_token_id is None:
                raise InputError("bos=True, but the tokenizer has no such token: leave out --bos")
            ids[:, 0] = self.tokenizer.bos_token_id
        if shape.padding:
            ids[:, -shape.padding :] = self.filler()
        return replace(condition, ids=ids)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose."""
        return self._rng(purpose, self.draw)

    def _rng(self, purpose: str, draw: int) -> np.random.Generator:
        # A stream of its own for each purpose: adding a condition leaves the others as they were.
        digest = hashlib.sha256(purpose.encode()).digest()
        own = [draw] if draw else []  # the first draw is what one draw alone would be
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *own])

    def _text(self, source: str) -> Text:
        if source not in self._texts:
            self._texts[source] = load_data(source)
        return self._texts[source]

    def windows(self, source: str) -> Ids:
        """Non-overlapping windows of a text, chosen at random, in random order [N, T]."""
        if source not in self._sequences:
            ids = encode(self.tokenizer, self._text(source).documents)
            length, needed = self.shape.sequence_length, self.shape.num_sequences
            available = len(ids) // length
            if available < needed * self.num_draws:
                fitting = available // (self.shape.batch_size * self.num_draws)
                raise InputError(
                    f"{source} gives {len(ids):,} tokens, and "
                    f"{self.shape.num_tokens * self.num_draws:,} are needed: "
                    "give a longer text" + (f", or --num-batches {fitting}" if fitting >= 2 else "")
                )
            # All draws cut one permutation into pieces, so that none shares a window with another.
            order = self._rng(f"windows:{_label(source)}", 0).permutation(available)
            chosen = order[self.draw * needed : (self.draw + 1) * needed]
            self._sequences[source] = ids[: available * length].reshape(available, length)[chosen]
        return self._sequences[source]

    def filler(self) -> int:
        """The token for padding; where there is none, that for the end or the beginning of text."""
        tokenizer = self.tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0


Maker = Callable[[ConditionBuilder, str], Condition]
"""Makes a condition, given the builder and what follows the kind's name and a colon."""


def _uniform(builder: ConditionBuilder, argument: str) -> Condition:
    if argument not in ("", "embedding"):
        raise InputError(
            f"mock-uniform:{argument} is unknown: give mock-uniform or mock-uniform:embedding"
        )
    size = (builder.shape.num_sequences, builder.shape.sequence_length)
    if argument:
        rows = _subject(builder, "mock-uniform:embedding").embedding_rows
        ids = builder.rng("uniform embedding").integers(0, rows, size=size)
        what = f"every id drawn uniformly from all {rows:,} rows of the embedding"
        return Condition("whole-embedding mock", "mock", "mock-uniform:embedding", what, ids)
    tokenizer = builder.tokenizer
    valid = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    ids = builder.rng("uniform").choice(np.array(valid, dtype=np.int64), size=size)
    what = "every id drawn uniformly from the tokenizer's ordinary tokens"
    return Condition("uniform mock", "mock", "mock-uniform", what, ids)


def _repeat(builder: ConditionBuilder, argument: str) -> Condition:
    if argument and not argument.isdecimal():
        raise InputError(f"mock-repeat:{argument} is no token: give mock-repeat or mock-repeat:ID")
    token = int(argument) if argument else builder.filler()
    known = max(builder.tokenizer.get_vocab().values(), default=-1)
    if argument and token > known:
        raise InputError(f"mock-repeat:{token} is no token: ids go from 0 to {known}")
    size = (builder.shape.num_sequences, builder.shape.sequence_length)
    source = f"mock-repeat:{token}" if argument else "mock-repeat"
    name = f"repeated token {token}" if argument else "repeated token"
    return Condition(
        name, "mock", source, f"token {token} throughout", np.full(size, token, np.int64)
    )


def _dealt(builder: ConditionBuilder, argument: str) -> Condition:
    source = argument or builder.default_text
    label, windows = _label(source), builder.windows(source)
    ids = builder.rng(f"unigram:{label}").permutation(windows.ravel()).reshape(windows.shape)
    what = f"the tokens of {label}, dealt out at random over all sequences"
    return Condition("unigram mock", "mock", f"mock-unigram:{label}", what, ids)


def _shuffled(builder: ConditionBuilder, argument: str) -> Condition:
    label = _label(_text_named(argument, "shuffled"))
    ids = builder.rng(f"shuffled:{label}").permuted(builder.windows(argument), axis=1)
    what = f"the sequences of {label}, each with its tokens in random order"
    return Condition(f"shuffled {_short(label)}", "control", f"shuffled:{label}", what, ids)


def _generated(builder: ConditionBuilder, argument: str) -> Condition:
    label = _label(_text_named(argument, "generated"))
    subject = _subject(builder, "generated:SOURCE")
    length = builder.shape.sequence_length
    prompt = max(1, length // 4)
    parts = [
        subject.continue_text(ids, length - prompt, int(seed))
        for ids, seed in zip(
            np.split(builder.windows(argument)[:, :prompt], builder.shape.num_batches),
            builder.rng(f"generated:{label}").integers(0, 2**31, builder.shape.num_batches),
            strict=True,
        )
    ]
    what = f"the first {prompt} tokens of the sequences of {label}, and what the model draws after them"
    return Condition(
        f"generated from {_short(label)}",
        "control",
        f"generated:{label}",
        what,
        np.concatenate(parts),
    )


KINDS: dict[str, Maker] = {
    "mock-uniform": _uniform,
    "mock-unigram": _dealt,
    "mock-repeat": _repeat,
    "shuffled": _shuffled,
    "generated": _generated,
}
"""Conditions that are made, by the first part of their SOURCE."""


def register(name: str, maker: Maker) -> None:
    """Adds a kind of condition: SOURCE `NAME` or `NAME:ARGUMENT`.

    Args:
        name: Without a colon.
        maker: Called with the builder and the argument ("" without one). The ids it gives must have
            the builder's shape.

    Raises:
        InputError: The name is taken, or cannot be told from an argument.
    """
    if name in KINDS or name in RESERVED or ":" in name or not name:
        raise InputError(
            f"a condition cannot be called {name!r}: choose a free name without a colon"
        )
    KINDS[name] = maker


RESERVED = frozenset({"builtin", "packaged", "hf", "turns", "grid"})
"""First parts of a SOURCE that mean real texts."""


def _text_named(argument: str, kind: str) -> str:
    if not argument:
        raise InputError(f"{kind}: lacks its text: write {kind}:SOURCE")
    return argument


def _subject(builder: ConditionBuilder, source: str) -> Subject:
    if builder.subject is None:
        raise InputError(f"{source} needs the model: it can be fed by `dodoco observe` only")
    return builder.subject


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Ids:
    """Ids of the documents one after another, separated by the end-of-text token if there is one [N]."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [tokenizer.encode(text, add_special_tokens=False) + separator for text in documents]
    return np.array([token for part in parts for token in part], dtype=np.int64)


def _label(source: str) -> str:
    """A source without folders: reports must not carry machine paths."""
    known = ("builtin:", "packaged:", "hf:", "turns:")
    if source.startswith("turns:") and "/" in source and ":hf:" not in source:
        return source.rpartition("/")[2]
    return source if source.startswith(known) else Path(source).name


def _short(label: str) -> str:
    for prefix in ("builtin:", "packaged:", "hf:"):
        label = label.removeprefix(prefix)
    return label
