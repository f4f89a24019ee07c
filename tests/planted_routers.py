"""Routers whose true Gini is known, observed as a model is: choices, recording, cells, figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.observatory.grid.batch_scan import batch_scan
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.figures import analyse
from dodoco_ext.observatory.grid.results import BatchScan, GridCell
from dodoco_ext.observatory.summary import Summary, Window, counts_of, summarise
from dodoco_ext.recording import Reader
from dodoco_ext.sampling import inclusion_of, selection_of
from planted import Planted, layers

FloatArray = NDArray[np.float64]

EXPERTS, TOP_K, TOKENS, LAYERS, BATCH, RANKS = 64, 4, 128, 2, 8, 8

_KINDS = 4096
"""Sequences over which the truth of a router with jitter is averaged."""


@dataclass(frozen=True)
class Router:
    """How one layer chooses: a set of k experts has probability proportional to the product of its weights.

    Attributes:
        log_weights: [E].
        jitter: Standard deviation of what each sequence adds to each expert's log weight: texts differ,
            and the tokens of one text are alike.
    """

    log_weights: FloatArray
    jitter: float = 0.0

    def of_sequences(self, rng: np.random.Generator, number: int) -> FloatArray:
        """Selection probabilities of sequences [number, E, k + 1]."""
        added = rng.normal(0.0, self.jitter, (number, len(self.log_weights)))
        return selection_of(self.log_weights + added, TOP_K)

    def truth(self, rng: np.random.Generator) -> tuple[float, float]:
        """Root mean squared Gini of passes of infinitely many tokens, over experts and over ranks."""
        loads = inclusion_of(self.of_sequences(rng, _KINDS if self.jitter else BATCH))
        loads = loads.reshape(-1, BATCH, EXPERTS).mean(axis=1)
        placement = metrics.contiguous_placement(EXPERTS, RANKS)
        both = (metrics.gini(loads), metrics.gini(metrics.rank_counts(loads, placement)))
        experts, ranks = (float(np.sqrt(np.mean(np.square(gini)))) for gini in both)
        return experts, ranks


def router(target: float, rng: np.random.Generator, jitter: float = 0.0) -> Router:
    """A router of that Gini over experts without its jitter; bell-shaped log weights, scaled by bisection."""
    shape = rng.normal(size=EXPERTS)
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        found = float(metrics.gini(inclusion_of(selection_of(middle * shape, TOP_K))))
        low, high = (middle, high) if found < target else (low, middle)
    return Router(high * shape if target else 0 * shape, jitter)


def choose(rng: np.random.Generator, table: FloatArray, tokens: int) -> NDArray[np.int64]:
    """Distinct experts of tokens [S, tokens, k] by selection probabilities [S, E, k + 1], token by token."""
    left = np.full((len(table), tokens), TOP_K)
    ids = np.full((len(table), tokens, TOP_K), -1, np.int64)
    rows = np.arange(len(table))[:, None]
    for expert in range(EXPERTS):
        takes = rng.random(left.shape) < table[rows, expert, left]
        sequence, token = np.nonzero(takes)
        ids[sequence, token, left[takes] - 1] = expert
        left -= takes
    assert not left.any()
    return ids


@dataclass(frozen=True, eq=False)
class Observed:
    """What came out at the end.

    Attributes:
        cell: Figures of the grid, from counts of sequences.
        summary: Figures of `dodoco observe`, from passes of BATCH sequences.
        counted: The cell itself.
    """

    cell: GridCell
    summary: Summary
    counted: Cell

    def batch_scan(self) -> BatchScan:
        """Its scan over batch sizes."""
        return batch_scan(self.counted, 0)


def observe(
    routers: list[Router], rng: np.random.Generator, draws: int = 2, sequences: int = 64
) -> Observed:
    """Routes sequences through recordings and summarises what those hold."""
    number = draws * sequences
    ids = np.stack(
        [choose(rng, one.of_sequences(rng, number), TOKENS) for one in routers], axis=1
    )  # [S, L, T, k]
    one_by_one = _recorded(ids, 1)
    counts = np.array(one_by_one.counts)
    cell = Cell(
        model="planted",
        name="text",
        kind="real",
        source="planted",
        description="planted routing",
        counts=counts.reshape(draws, sequences, len(routers), EXPERTS).astype(np.int32),
        losses=np.zeros((draws, sequences)),
        top_k=[TOP_K] * len(routers),
        layer_names=[layer.name for layer in one_by_one.board.layers],
        key={"shape": {"sequence_length": TOKENS}},
        facts={},
    )
    analysed = analyse(cell, "planted.npz", BATCH, RANKS, 0)
    return Observed(analysed.cell, summarise(_recorded(ids, BATCH), seed=0), cell)


def _recorded(ids: NDArray[np.int64], sequences_a_pass: int) -> Window:
    """A recording of passes of whole sequences, ids [S, L, T, k]."""
    planted = Planted(layers(ids.shape[1], EXPERTS, TOP_K))
    reader = Reader(planted.path)
    start = before = reader.snapshot()
    counts = []
    for first in range(0, len(ids), sequences_a_pass):
        for layer in range(ids.shape[1]):
            planted.route(layer, ids[first : first + sequences_a_pass, layer].reshape(-1, TOP_K))
        after = reader.snapshot()
        counts.append(counts_of(after - before))
        before = after
    window = Window(before - start, [*reader.records().reshape(-1, ids.shape[1])], counts)
    window.check()
    planted.close()
    return window
