"""Figures of cells against planted routing and against their definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.observatory.conditions import GRID
from dodoco_ext.observatory.grid.batch_arms import deal
from dodoco_ext.observatory.grid.batch_scan import batch_scan, batch_sizes
from dodoco_ext.observatory.grid.batch_slopes import slope_of
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.figures import analyse
from dodoco_ext.observatory.grid.passes import passes_of, stream
from dodoco_ext.observatory.zoo.species import SPECIES
from dodoco_ext.sampling import inclusion_probabilities
from grid_cases import DRAWS, EXPERTS, LAYERS, SEQUENCES, TOKENS, TOP_K, cell, planted

BATCH = 4
SKEWED = np.linspace(0, 1.2, EXPERTS)


def alike(strength: float) -> Cell:
    """A cell each of whose sequences has preferences of its own: its tokens resemble each other."""
    rng = np.random.default_rng(7)
    shape = (DRAWS, SEQUENCES, LAYERS, EXPERTS)
    weights = rng.normal(0, strength, shape) + rng.gumbel(size=(TOKENS, *shape))
    ranks = np.argsort(np.argsort(-weights, axis=-1), axis=-1)
    return cell((ranks < TOP_K).sum(axis=0))


def test_figures_are_means_over_passes_and_layers() -> None:
    planted_cell = planted(SKEWED)
    passes = passes_of(planted_cell.counts, BATCH)
    found = analyse(planted_cell, "f.npz", BATCH, 8, 0).cell
    gini, peak = np.asarray(metrics.gini(passes)), np.asarray(metrics.max_over_mean(passes))
    assert found.experts.gini == pytest.approx(gini.mean())
    assert found.experts.max_over_mean == pytest.approx(peak.mean())
    null = nulls.null(TOKENS * BATCH, EXPERTS, TOP_K)
    assert found.experts.null_gini == null.gini_mean
    assert found.experts.null_max_over_mean == null.max_over_mean_mean
    ranks = passes.reshape(*passes.shape[:2], 8, -1).sum(axis=-1)
    assert found.ranks is not None
    assert found.ranks.max_over_mean == pytest.approx(
        np.asarray(metrics.max_over_mean(ranks)).mean()
    )
    for number, layer in enumerate(found.layers):
        assert layer.counts == passes[:, number].sum(axis=0).tolist()
        assert layer.pass_gini == gini[:, number].tolist()
        assert layer.experts.corrected_gini == nulls.corrected_gini(
            gini[:, number], TOKENS * BATCH, EXPERTS, TOP_K, counts=layer.counts
        )
        assert layer.experts.window_gini == metrics.gini(layer.counts)
    assert found.num_tokens == DRAWS * SEQUENCES * TOKENS


def test_the_corrected_gini_is_that_of_the_planted_router() -> None:
    found = analyse(planted(SKEWED), "f.npz", BATCH, 8, 0).cell.experts
    truth = float(metrics.gini(inclusion_probabilities(SKEWED, TOP_K)))
    low, high = found.corrected_gini_interval
    assert low < truth < high
    assert high - low < 0.02
    assert found.gini > high


def test_uniform_routing_reads_zero() -> None:
    found = analyse(planted(None), "f.npz", BATCH, 8, 0).cell
    assert found.experts.corrected_gini == 0
    assert found.experts.gini > 0.04


def test_ranks_that_cannot_be_equal_are_left_out() -> None:
    found = analyse(planted(None), "f.npz", BATCH, 5, 0).cell
    assert found.ranks is None
    assert all(layer.ranks is None for layer in found.layers)


def test_draws_that_differ_by_more_than_their_sequences_are_noticed() -> None:
    same = analyse(planted(SKEWED), "f.npz", BATCH, 8, 0).cell.draws
    two = np.concatenate([planted(SKEWED).counts[:1], planted(SKEWED * 1.3).counts[:1]])
    other = analyse(cell(two), "f.npz", BATCH, 8, 0).cell.draws
    assert same.p_value > 0.05
    assert other.p_value < 0.01
    assert other.seed_sd > 3 * other.expected_sd


def test_one_draw_has_no_interval_over_draws() -> None:
    found = analyse(cell(planted(SKEWED).counts[:1]), "f.npz", BATCH, 8, 0).cell.draws
    assert np.isnan(found.p_value)
    assert len(found.corrected_gini) == 1


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = (analyse(planted(SKEWED), "f", BATCH, 8, s).cell for s in (0, 0, 1))
    assert first == again
    assert first.experts.gini == other.experts.gini
    assert first.experts.gini_interval != other.experts.gini_interval


def test_uniform_routing_has_a_raw_trend_and_no_corrected_one() -> None:
    scan = batch_scan(planted(None), 0)
    assert scan.growing.raw_slope.verdict == "falls"
    assert scan.growing.corrected_slope.verdict == "none"
    assert scan.equal.corrected_slope.verdict == "none"
    assert scan.verdict == "vanishes"
    for low, high in scan.dispersion_interval:
        assert low < 1 < high


def test_independent_tokens_have_no_corrected_trend_whatever_their_loads() -> None:
    hot = np.where(np.arange(EXPERTS) < 4, 2.0, 0.0)
    for weights in (SKEWED, hot):
        scan = batch_scan(planted(weights), 0)
        assert scan.growing.raw_slope.verdict == "falls"
        assert scan.verdict == "vanishes"


def test_tokens_that_resemble_each_other_leave_a_trend_at_equal_token_counts_too() -> None:
    scan = batch_scan(alike(0.6), 0)
    assert scan.verdict == "survives"
    assert scan.growing.corrected_slope.verdict == "falls"
    assert scan.equal.corrected_slope.verdict == "falls"
    assert all(low > 1 for low, _ in scan.dispersion_interval)
    assert scan.equal.tokens == [TOKENS] * len(scan.batch_sizes)
    assert scan.growing.tokens == [TOKENS * size for size in scan.batch_sizes]


def test_a_batch_of_one_is_the_same_in_both_arms() -> None:
    scan = batch_scan(planted(SKEWED), 0)
    assert scan.growing.gini[0] == scan.equal.gini[0]
    assert scan.growing.corrected_gini[0] == pytest.approx(scan.equal.corrected_gini[0])


def test_dealt_assignments_sum_to_their_pass() -> None:
    passes = passes_of(planted(SKEWED).counts, 8)
    dealt = deal(passes, 8, stream(0, "deal"))
    assert np.array_equal(dealt.reshape(-1, 8, *passes.shape[1:]).sum(axis=1), passes)
    assert np.ptp(dealt.sum(axis=-1)) == 0
    assert not np.array_equal(dealt, deal(passes, 8, stream(1, "deal")))


def test_passes_never_mix_draws_and_leave_out_what_is_left_over() -> None:
    counts = planted(None).counts[:, :10]
    passes = passes_of(counts, 4)
    assert len(passes) == DRAWS * 2
    assert np.array_equal(passes[1], counts[0, 4:8].sum(axis=0))
    assert np.array_equal(passes[2], counts[1, :4].sum(axis=0))
    with pytest.raises(InputError, match="a draw of 10 sequences holds no pass of 16"):
        passes_of(counts, 16)


def test_scans_use_only_sizes_that_leave_eight_passes() -> None:
    assert batch_sizes(4, 128) == [1, 2, 4, 8, 16, 32]
    assert batch_sizes(2, 16) == [1, 2, 4]
    with pytest.raises(InputError, match="too few for a scan"):
        batch_sizes(1, 4)


def test_the_slope_is_per_doubling() -> None:
    assert slope_of(np.array([3.0, 5.0, 7.0]), [1, 2, 4]) == pytest.approx(2.0)


def test_a_cell_of_layers_with_other_top_k_uses_each_ones_null() -> None:
    counts = planted(None).counts.copy()
    counts[:, :, 1] *= 0
    counts[:, :, 1, :8] = TOKENS  # every token takes the same eight
    mixed = replace(cell(counts), top_k=[TOP_K, 8])
    layers = analyse(mixed, "f.npz", BATCH, 8, 0).cell.layers
    assert layers[0].experts.corrected_gini == 0
    assert layers[1].experts.corrected_gini == pytest.approx(0.75)
    assert layers[1].experts.null_gini < layers[0].experts.null_gini


def test_the_grid_is_five_models_by_six_conditions_at_equal_tokens() -> None:
    assert (len(SPECIES), len(GRID)) == (5, 6)
    stored = Path(__file__).parents[1] / "benchmarks" / "results" / "observatory_grid.json"
    cells = json.loads(stored.read_text())["cells"]
    assert len({(cell["model"], cell["condition"]) for cell in cells}) == len(cells) == 30
    assert len({cell["num_tokens"] for cell in cells}) == 1
