"""Window gauges: one window for all who scrape, and figures as docs/metrics.md defines them."""

from __future__ import annotations

import numpy as np
import pytest

import dodoco_ext as dodoco
from dodoco_ext import metrics, nulls
from dodoco_ext.views.exporter.state import State
from exposed import Clock, Exposed, scraped
from served import Served, server, work

LAYER = "model.layers.0.mlp.gate"
GAUGES = (
    "window_gini",
    "window_gini_corrected",
    "window_gini_floor",
    "window_expert_max_over_mean",
    "window_unused_experts",
)


def gauges(seen: Exposed) -> dict[str, dict[str, float]]:
    return {name: seen.by("layer", name) for name in GAUGES if seen.of(name)}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_figures_are_those_of_the_counts_in_between(clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    ranks = server(2, layers=1, num_experts=64, top_k=4)
    work(ranks, tokens=500, skew=2.0)  # before the window: not in it
    assert gauges(scraped(state)) == {}
    clock.pass_by(60)
    assert gauges(scraped(state)) == {}, "the first one was not whole"
    before = [dodoco.Reader(rank.path).snapshot() for rank in ranks]
    for seed in range(4):
        work(ranks, tokens=64, seed=seed, skew=0.5)
    clock.pass_by(60)
    seen = gauges(scraped(state))
    after = [dodoco.Reader(rank.path).snapshot() for rank in ranks]
    counts = sum((b - a).layers[0].counts for a, b in zip(before, after, strict=True))
    tokens = 2 * 4 * 64
    assert int(np.sum(counts)) == 4 * tokens
    gini = float(metrics.gini(counts))
    assert seen["window_gini"] == {LAYER: pytest.approx(gini)}
    floor = nulls.null(tokens, 64, 4).gini_mean
    assert seen["window_gini_floor"] == {LAYER: pytest.approx(floor, rel=1e-6)}
    corrected = nulls.corrected_gini([gini], tokens, 64, 4)
    assert 0 < corrected < gini
    assert seen["window_gini_corrected"] == {LAYER: pytest.approx(corrected, abs=0.003)}
    assert seen["window_expert_max_over_mean"] == {
        LAYER: pytest.approx(float(metrics.max_over_mean(counts)))
    }
    assert seen["window_unused_experts"] == {LAYER: int(metrics.unused_experts(counts))}


@pytest.mark.parametrize("tokens", [3, 11, 100, 777, 40_000])
def test_the_floor_and_the_correction_between_simulated_sizes(tokens: int, clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    made = Served(layers=1, num_experts=64, top_k=6)
    made.route_all(8)
    for _ in range(2):
        scraped(state)
        clock.pass_by(60)
    made.route_all(tokens, seed=1, skew=0.3)
    found = gauges(scraped(state))
    floor = float(nulls.null_gini_mean(tokens, 64, 6))
    assert found["window_gini_floor"][LAYER] == pytest.approx(floor, rel=0.01)
    exact = nulls.corrected_gini([found["window_gini"][LAYER]], tokens, 64, 6)
    assert found["window_gini_corrected"][LAYER] == pytest.approx(exact, abs=0.02)


def test_two_scrapers_agree_within_a_window(clock: Clock) -> None:
    one, other = State(window_s=60, clock=clock), State(window_s=60, clock=clock)
    made = Served()
    for state in (one, other):
        state.update()
    clock.pass_by(60)
    for state in (one, other):
        state.update()
    work([made], tokens=50, skew=1.0)
    clock.pass_by(60)
    first = gauges(scraped(one))
    assert first
    for _ in range(5):
        assert gauges(scraped(one)) == gauges(scraped(other)) == first
        work([made], tokens=50, seed=7)
        clock.pass_by(5)
    clock.pass_by(30)
    assert gauges(scraped(one)) != first


def test_a_window_without_traffic_has_no_figures(clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    work([Served()])
    for _ in range(4):
        seen = scraped(state)
        clock.pass_by(60)
    assert seen.of("tokens_total")
    assert gauges(seen) == {}


def test_a_window_that_was_missed_gives_none(clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    made = Served()
    for passed in (60, 60, 180):  # the last time nobody looked for three minutes
        scraped(state)
        work([made])
        clock.pass_by(passed)
    assert gauges(scraped(state)) == {}


def test_without_top_k_there_is_a_gini_and_no_floor(clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    made = Served(layers=1, top_k=0)
    for _ in range(2):
        scraped(state)
        clock.pass_by(60)
    made.route(0, [[0, 1], [0, 2]])
    seen = gauges(scraped(state))
    assert set(seen) == {"window_gini", "window_expert_max_over_mean", "window_unused_experts"}


def test_what_an_old_recording_had_counted_is_in_no_window(clock: Clock) -> None:
    state = State(window_s=60, clock=clock)
    Served(labels={"model_name": "other"})
    for _ in range(2):
        scraped(state)
        clock.pass_by(60)
    scraped(state)
    # Found only now, though it began before: as if its folder had been mounted late.
    clock.now_ns += 60 * 10**9
    made = Served(layers=1)
    made.route_all(100)
    clock.now_ns += 3600 * 10**9
    for _ in range(2):
        scraped(state)
        clock.pass_by(60)
    made.route(0, [[0, 1]])
    found = gauges(scraped(state))
    assert found["window_unused_experts"] == {LAYER: 6}
