"""Figures of one cell: Gini and max/mean over experts and ranks, their nulls, their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dodoco_ext import metrics, nulls
from dodoco_ext.intervals import expanded_interval, resampled_means, student_t
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.passes import (
    NUM_RESAMPLES,
    Counts,
    FloatArray,
    passes_of,
    root_mean,
    stream,
    tokens_of,
)
from dodoco_ext.observatory.grid.results import Draws, Figures, GridCell, Layer
from dodoco_ext.observatory.result import Interval


@dataclass(frozen=True, eq=False)
class Resampled:
    """Resamples of a cell's overall figures over experts, for what compares cells.

    Attributes:
        gini, corrected: [resamples].
        num_passes: How many were resampled.
    """

    gini: FloatArray
    corrected: FloatArray
    num_passes: int


@dataclass(frozen=True, eq=False)
class Analysed:
    """A cell's figures, and their resamples."""

    cell: GridCell
    resampled: Resampled


@dataclass(frozen=True, eq=False)
class _Scope:
    """Imbalance over experts or over ranks: [passes, layers], [layers] and resamples of means."""

    overall: Figures
    layers: list[Figures]
    excess: FloatArray
    gini: FloatArray
    noise: FloatArray
    resampled: Resampled


def analyse(cell: Cell, file: str, batch: int, num_ranks: int, seed: int) -> Analysed:
    """Computes every figure of a cell.

    Args:
        cell: What was acquired.
        file: Name of its file, for the record.
        batch: Sequences a pass.
        num_ranks: Size of the EP group of `ranks`.
        seed: Seed of the resampling.
    """
    passes = passes_of(cell.counts, batch)
    tokens = tokens_of(cell) * batch
    num_experts = passes.shape[-1]
    experts = _scope(cell, passes, tokens, None, seed)
    ranks = None
    if num_experts % num_ranks == 0:
        ranks = _scope(cell, passes, tokens, num_ranks, seed)
    totals = passes.sum(axis=0)
    layers = [
        Layer(
            name=name,
            num_experts=num_experts,
            top_k=cell.top_k[number],
            counts=totals[number].tolist(),
            unused_experts=int((totals[number] == 0).sum()),
            experts=experts.layers[number],
            ranks=None if ranks is None else ranks.layers[number],
            pass_gini=experts.gini[:, number].tolist(),
            pass_tokens=tokens,
            noise=float(experts.noise[number]),
        )
        for number, name in enumerate(cell.layer_names)
    ]
    draws, sequences = cell.losses.shape
    length = cell.key["shape"]["sequence_length"]
    figures = GridCell(
        model=cell.model,
        condition=cell.name,
        kind=cell.kind,
        source=cell.source,
        description=cell.description,
        file=file,
        sha256=cell.sha256,
        num_sequences=draws * sequences,
        sequence_length=length,
        num_tokens=draws * sequences * length,
        loss=float(cell.losses.mean()),
        experts=experts.overall,
        ranks=None if ranks is None else ranks.overall,
        draws=_draws(experts.excess, draws, stream(seed, "draws", cell.model, cell.name)),
        layers=layers,
    )
    return Analysed(figures, experts.resampled)


def _scope(cell: Cell, passes: Counts, tokens: int, num_ranks: int | None, seed: int) -> _Scope:
    num_experts, totals = passes.shape[-1], passes.sum(axis=0)
    placement = None if num_ranks is None else metrics.contiguous_placement(num_experts, num_ranks)
    loads = passes if placement is None else metrics.rank_counts(passes, placement)
    gini, peak = np.asarray(metrics.gini(loads)), np.asarray(metrics.max_over_mean(loads))
    size = (tokens, num_experts)
    floors = [nulls.null(*size, k, placement) for k in cell.top_k]
    noise = np.array(
        [nulls.gini_noise(*size, k, totals[n], placement) for n, k in enumerate(cell.top_k)]
    )
    corrected = [
        nulls.corrected_gini(gini[:, n], *size, k, counts=totals[n], placement=placement)
        for n, k in enumerate(cell.top_k)
    ]
    window = np.asarray(metrics.gini(loads.sum(axis=0)))
    excess = gini**2 - noise
    names = (cell.model, cell.name, "experts" if placement is None else "ranks")
    columns = np.stack([gini, peak, excess], axis=1)  # [passes, 3, layers]
    means = resampled_means(columns, stream(seed, *names), NUM_RESAMPLES)
    roots = np.sqrt(np.maximum(means[:, 2], 0.0))
    by_layer = [
        expanded_interval(values, len(passes)) for values in (means[:, 0], roots, means[:, 1])
    ]
    layers = [
        Figures(
            gini=float(gini[:, n].mean()),
            gini_interval=_pair(by_layer[0][:, n]),
            null_gini=floor.gini_mean,
            null_gini_band=(floor.gini_low, floor.gini_high),
            corrected_gini=corrected[n],
            corrected_gini_interval=_pair(by_layer[1][:, n]),
            max_over_mean=float(peak[:, n].mean()),
            max_over_mean_interval=_pair(by_layer[2][:, n]),
            null_max_over_mean=floor.max_over_mean_mean,
            null_max_over_mean_band=(floor.max_over_mean_low, floor.max_over_mean_high),
            window_gini=float(window[n]),
        )
        for n, floor in enumerate(floors)
    ]
    resampled = Resampled(means[:, 0].mean(axis=1), root_mean(means[:, 2]), len(passes))
    overall = _overall(layers, resampled, means[:, 1].mean(axis=1))
    return _Scope(overall, layers, excess, gini, noise, resampled)


def _overall(layers: list[Figures], resampled: Resampled, peak: FloatArray) -> Figures:
    def mean(name: str) -> float:
        return float(np.mean([getattr(layer, name) for layer in layers]))

    def band(name: str) -> Interval:
        return _pair(np.mean([getattr(layer, name) for layer in layers], axis=0))

    def interval(values: FloatArray) -> Interval:
        return _pair(expanded_interval(values, resampled.num_passes))

    return Figures(
        gini=mean("gini"),
        gini_interval=interval(resampled.gini),
        null_gini=mean("null_gini"),
        null_gini_band=band("null_gini_band"),
        corrected_gini=mean("corrected_gini"),
        corrected_gini_interval=interval(resampled.corrected),
        max_over_mean=mean("max_over_mean"),
        max_over_mean_interval=interval(peak),
        null_max_over_mean=mean("null_max_over_mean"),
        null_max_over_mean_band=band("null_max_over_mean_band"),
        window_gini=mean("window_gini"),
    )


def _draws(excess: FloatArray, num_draws: int, rng: np.random.Generator) -> Draws:
    """Whether draws differ by more than their passes do: passes are dealt anew to the draws."""
    grouped = excess.reshape(num_draws, -1, excess.shape[-1])
    values = root_mean(grouped.mean(axis=1))
    if num_draws < 2:
        nan = float("nan")
        return Draws(values.tolist(), (nan, nan), nan, nan, nan)
    spread = float(values.std(ddof=1))
    order = rng.permuted(np.tile(np.arange(len(excess)), (NUM_RESAMPLES, 1)), axis=1)
    dealt = np.stack(
        [root_mean(excess[part].mean(axis=1)) for part in np.split(order, num_draws, axis=1)]
    )
    by_chance = dealt.std(axis=0, ddof=1)
    half = student_t(0.95, num_draws - 1) * spread / num_draws**0.5
    return Draws(
        corrected_gini=values.tolist(),
        interval=(float(values.mean()) - half, float(values.mean()) + half),
        seed_sd=spread,
        expected_sd=float(np.sqrt((by_chance**2).mean())),
        p_value=float((1 + (by_chance >= spread).sum()) / (1 + NUM_RESAMPLES)),
    )


def _pair(ends: FloatArray) -> Interval:
    return float(ends[0]), float(ends[1])
