"""From what a recording holds to what a report says: per-layer figures, overall figures, ratios."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.errors import DodocoError
from dodoco_ext.intervals import bootstrap_interval, bootstrap_ratio_interval
from dodoco_ext.observatory.result import ConditionResult, LayerResult, Overall, Ratio

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Window:
    """What one condition left in the recording.

    Attributes:
        board: Difference of the snapshots around it.
        passes: Its ring records, one structured array [L] in layer order a pass.
        counts: What the board counted in each pass, int64 [E] a layer: [passes][layers].
    """

    board: Snapshot
    passes: list[NDArray[np.void]]
    counts: list[list[NDArray[np.int64]]]

    def check(self) -> None:
        """Compares the two halves of the recording with each other.

        Raises:
            DodocoError: The ring's records do not add up to the board's counters.
        """
        in_ring = np.sum([p["assignments"].astype(np.int64) for p in self.passes], axis=0)
        for layer, assignments in zip(self.board.layers, in_ring, strict=True):
            if (
                layer.in_flight
                or layer.passes != len(self.passes)
                or layer.assignments != assignments
            ):
                raise DodocoError(
                    f"{layer.name}: the board counted {layer.assignments} assignments in "
                    f"{layer.passes} passes, the ring {assignments} in {len(self.passes)}; "
                    "let nothing else run the model meanwhile"
                )
        for counts, record in zip(self.counts, self.passes, strict=True):
            if [int(c.sum()) for c in counts] != record["assignments"].tolist():
                raise DodocoError(
                    f"a pass of {record['assignments'].tolist()} assignments moved the board by "
                    f"{[int(c.sum()) for c in counts]}; let nothing else run the model meanwhile"
                )


def counts_of(board: Snapshot) -> list[NDArray[np.int64]]:
    """Expert counts of each layer, int64 [E]."""
    return [layer.counts.astype(np.int64) for layer in board.layers]


@dataclass(frozen=True, eq=False)
class Summary:
    """Figures of one condition: what `ConditionResult` says beyond the condition itself."""

    layers: list[LayerResult]
    overall: Overall
    pass_gini: list[list[float]]
    pass_tokens: list[list[int]]


def summarise(window: Window, seed: int) -> Summary:
    """Computes every figure of a condition.

    Args:
        window: Its part of the recording, checked.
        seed: Seed of the bootstrap.
    """
    num_experts = np.array([layer.num_experts for layer in window.board.layers])
    columns = {name: np.stack([p[name] for p in window.passes]).astype(np.int64) for name in USED}
    gini = np.asarray(
        metrics.gini_from_numerator(columns["gini_numerator"], columns["assignments"], num_experts)
    )
    peak = num_experts * columns["max_count"] / columns["assignments"]
    layers = [
        _layer(
            layer, gini[:, i], peak[:, i], columns["tokens"][:, i], columns["unused_experts"][:, i]
        )
        for i, layer in enumerate(window.board.layers)
    ]
    excess = _excess(gini, columns["tokens"], [(x.num_experts, x.top_k) for x in layers])
    overall = Overall(
        gini=_mean(x.gini for x in layers),
        null_gini=_mean(x.null_gini for x in layers),
        corrected_gini=_mean(x.corrected_gini for x in layers),
        corrected_gini_interval=bootstrap_interval(excess, root_of_mean, seed=seed),
        window_gini=_mean(x.window_gini for x in layers),
        max_over_mean=_mean(x.max_over_mean for x in layers),
        null_max_over_mean=_mean(x.null_max_over_mean for x in layers),
        unused_experts=_mean(x.unused_experts for x in layers),
    )
    return Summary(layers, overall, gini.tolist(), columns["tokens"].tolist())


def root_of_mean(excess: FloatArray) -> float:
    """Corrected Gini of a model from squared Gini minus the null's second moment [passes, layers].

    Averages over passes, takes the root layer by layer (0 where negative), averages over layers.
    """
    return float(np.sqrt(np.maximum(excess.mean(axis=0), 0.0)).mean())


def ratios(conditions: list[ConditionResult], seed: int) -> list[Ratio]:
    """Every mock or control over every real condition."""
    real = [c for c in conditions if c.kind == "real"]
    return [_ratio(c, r, seed) for c in conditions if c.kind != "real" for r in real]


USED = ("gini_numerator", "assignments", "max_count", "tokens", "unused_experts")
"""Fields of a ring record that figures are made of."""


def _layer(
    layer: LayerSnapshot,
    gini: FloatArray,
    peak: FloatArray,
    tokens: NDArray[np.int64],
    unused: NDArray[np.int64],
) -> LayerResult:
    top_k = layer.top_k or round(layer.assignments / max(layer.tokens, 1))
    per_pass = [nulls.null(int(t), layer.num_experts, top_k) for t in tokens]
    return LayerResult(
        name=layer.name,
        num_experts=layer.num_experts,
        top_k=top_k,
        passes=layer.passes,
        tokens=layer.tokens,
        assignments=layer.assignments,
        counts=[int(c) for c in layer.counts],
        gini=float(gini.mean()),
        null_gini=_mean(n.gini_mean for n in per_pass),
        null_gini_band=(_mean(n.gini_low for n in per_pass), _mean(n.gini_high for n in per_pass)),
        corrected_gini=nulls.corrected_gini(gini, tokens, layer.num_experts, top_k),
        window_gini=layer.gini,
        max_over_mean=float(peak.mean()),
        null_max_over_mean=_mean(n.max_over_mean_mean for n in per_pass),
        null_max_over_mean_band=(
            _mean(n.max_over_mean_low for n in per_pass),
            _mean(n.max_over_mean_high for n in per_pass),
        ),
        unused_experts=layer.unused_experts,
        unused_experts_per_pass=float(unused.mean()),
    )


def _excess(
    gini: FloatArray, tokens: NDArray[np.int64], sizes: list[tuple[int, int]]
) -> FloatArray:
    moments = [
        [nulls.null(int(t), *size).gini_second_moment for t, size in zip(row, sizes, strict=True)]
        for row in tokens
    ]
    excess: FloatArray = gini**2 - np.array(moments)
    return excess


def _excess_of(condition: ConditionResult) -> FloatArray:
    sizes = [(layer.num_experts, layer.top_k) for layer in condition.layers]
    return _excess(np.array(condition.pass_gini), np.array(condition.pass_tokens), sizes)


def _ratio(numerator: ConditionResult, real: ConditionResult, seed: int) -> Ratio:
    above, below = numerator.overall, real.overall
    return Ratio(
        numerator=numerator.name,
        denominator=real.name,
        gini=_over(above.gini, below.gini),
        gini_interval=bootstrap_ratio_interval(_raw_of(numerator), _raw_of(real), seed=seed),
        corrected=_over(above.corrected_gini, below.corrected_gini),
        corrected_interval=bootstrap_ratio_interval(
            _excess_of(numerator), _excess_of(real), statistic=root_of_mean, seed=seed
        ),
        layers_above=sum(
            a.corrected_gini > b.corrected_gini
            for a, b in zip(numerator.layers, real.layers, strict=True)
        ),
    )


def _raw_of(condition: ConditionResult) -> FloatArray:
    raw: FloatArray = np.array(condition.pass_gini).mean(axis=1)
    return raw


def _over(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
