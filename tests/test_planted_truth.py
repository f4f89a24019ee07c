"""Known Gini through recordings, summaries and intervals; the large version is benchmarks/planted_truth.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dodoco_ext import metrics
from planted_routers import EXPERTS, LAYERS, TOP_K, choose, observe, router

STORED = Path(__file__).parents[1] / "benchmarks" / "results" / "planted-truth.json"


@pytest.mark.parametrize("jitter", [0.0, 0.6])
def test_intervals_cover_the_truth(jitter: float) -> None:
    rng = np.random.default_rng(7)
    hits = {"grid": 0, "ranks": 0, "observe": 0}
    for _ in range(10):
        routers = [router(0.25, rng, jitter) for _ in range(LAYERS)]
        experts, ranks = np.array([one.truth(rng) for one in routers]).mean(axis=0)
        found = observe(routers, rng)
        for name, figures, truth in (
            ("grid", found.cell.experts, experts),
            ("ranks", found.cell.ranks, ranks),
            ("observe", found.summary.overall, experts),
        ):
            low, high = figures.corrected_gini_interval
            hits[name] += low <= truth <= high
    assert min(hits.values()) >= 7, hits  # of 9.5 expected; fewer in 1 of 1000 by chance


def test_a_truth_that_is_wrong_is_not_covered() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(4):
        found = observe([router(0.25, rng) for _ in range(LAYERS)], rng)
        low, high = found.cell.experts.corrected_gini_interval
        hits += low <= 0.265 <= high
    assert hits == 0


def test_uniform_routing_has_a_trend_in_raw_gini_and_none_in_corrected() -> None:
    rng = np.random.default_rng(9)
    scans = [observe([router(0.0, rng) for _ in range(LAYERS)], rng).batch_scan() for _ in range(4)]
    assert [scan.growing.raw_slope.verdict for scan in scans] == ["falls"] * 4
    assert all(scan.growing.raw_slope.value < -0.02 for scan in scans)
    assert sum(scan.growing.corrected_slope.verdict != "none" for scan in scans) <= 2
    assert abs(np.mean([scan.growing.corrected_slope.value for scan in scans])) < 0.004
    assert sum(scan.verdict == "vanishes" for scan in scans) >= 2


def test_routers_are_what_they_claim() -> None:
    rng = np.random.default_rng(10)
    one = router(0.3, rng)
    ids = choose(rng, one.of_sequences(rng, 4), 20_000)
    assert all(len(set(token)) == TOP_K for token in ids[0, :500].tolist())
    counts = np.bincount(ids.ravel(), minlength=EXPERTS)
    assert metrics.gini(counts) == pytest.approx(0.3, abs=0.004)
    assert one.truth(rng)[0] == pytest.approx(0.3, abs=1e-6)
    experts, ranks = router(0.3, rng, 0.6).truth(rng)
    assert 0.3 < experts < 0.34
    assert 0 < ranks < experts


def test_the_stored_simulation_covers_at_the_nominal_rate() -> None:
    stored = json.loads(STORED.read_text("utf-8"))
    rows = stored["coverage"]["rows"]
    assert {row["runs"] for row in rows} == {300}
    for row in rows:
        assert row["covered"] >= 0.92, row
        assert abs(row["bias"]) < 0.003, row
    assert stored["uniform"]["raw_trend"] == 1.0
    assert stored["uniform"]["corrected_trend"] <= 0.1
