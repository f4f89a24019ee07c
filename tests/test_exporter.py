"""What `dodoco metrics` says is what the recordings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recorder import Uncovered
from dodoco_ext.transfers import COMBINE
from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.render import render
from dodoco_ext.views.exporter.state import State
from dodoco_ext.views.exporter.table import BUCKETS, METRICS, OPTIONS, PASS_SIZES, reference
from exposed import Clock, scraped
from served import Served, server, work

DOCS = Path(__file__).parent.parent / "docs" / "prometheus.md"
IDS = [[0, 1], [1, 2], [7, 1]]


def test_a_rank_without_a_group() -> None:
    made = Served(uncovered=[Uncovered("vision.router", "no probe fits")])
    made.route(0, IDS)
    made.route(0, [[0, 9]])
    seen = scraped(State())
    labels = {"model_name": "tiny", "ep_group": "none", "rank": "0"}
    assert seen.one("recorder_up", **labels) == 1
    assert seen.one("ep_ranks", model_name="tiny", ep_group="none") == 1
    assert seen.by("layer", "tokens_total", **labels) == {"model.layers.0.mlp.gate": 4}
    assert seen.by("state", "layers", **labels) == {"covered": 2, "uncovered": 1}
    assert seen.by("reason", "dropped_assignments_total", **labels) == {"capacity": 0, "invalid": 1}
    assert set(seen.by("reason", "recorder_faults_total", **labels).values()) == {0}
    (info,) = seen["dodoco_recorder_info"]
    header = dodoco.open(made.path).header
    assert dict(info)["run"] == "serve"
    assert dict(info)["pid"] == str(header["owner_pid"])
    reader = dodoco.Reader(made.path)
    assert seen.one("last_pass_timestamp_seconds", **labels) == pytest.approx(
        reader.records()["time_ns"].max() / 1e9, abs=1e-6
    )
    assert seen.by("state", "exporter_recordings")["live"] == 1
    for absent in ("received_assignments_total", "alltoall_seconds_total", "window_gini"):
        assert seen.of(absent) == {}, "what is not known is absent, not zero"


def test_counters_are_those_of_every_rank() -> None:
    ranks = server(3, layers=2, num_experts=6)
    for seed in range(3):
        work(ranks, seed=seed)
    seen = scraped(State())
    for rank in ranks:
        reader = dodoco.Reader(rank.path)
        labels = {"model_name": "tiny", "ep_group": "ep:0-2", "rank": str(rank.rank)}
        snapshot = reader.snapshot()
        assert seen.by("layer", "tokens_total", **labels) == {
            layer.name: layer.tokens for layer in snapshot.layers
        }
        for op, code in (("dispatch", 2), ("combine", COMBINE)):
            mine = [totals for totals in reader.traffic() if totals.op == code]
            assert seen.one("alltoall_seconds_total", op=op, **labels) == pytest.approx(
                sum(totals.duration_ns for totals in mine) / 1e9
            )
            assert seen.by("direction", "alltoall_bytes_total", op=op, **labels) == {
                "sent": sum(totals.sent_bytes for totals in mine),
                "received": sum(totals.received_bytes for totals in mine),
            }
    assert seen.one("ep_ranks") == 3


def test_rows_received_are_assignments_received() -> None:
    ranks = server(2)
    matrix = [[5, 7], [11, 13]]
    for rank in ranks:
        rank.exchange(matrix, layer=0)
        rank.exchange([[1, 2], [3, 4]], layer=0, op=COMBINE)
    seen = scraped(State())
    assert {r: seen.one("received_assignments_total", rank=r) for r in (0, 1)} == {0: 16, 1: 20}


def test_rows_that_are_tokens_are_no_assignments_without_counts_per_expert() -> None:
    state = State()
    ranks = server(2)
    state.update()
    for rank in ranks:
        rank.exchange([[5, 7], [11, 13]], unit="token")
    assert scraped(state).of("received_assignments_total") == {}
    ranks[0].exchange([[5, 7], [11, 13]], unit="token", experts=[9, 8, 7, 6])
    seen = scraped(state)
    assert seen.by("rank", "received_assignments_total") == {"0": 30}


def test_without_transfers_contiguous_placement_says_what_a_rank_receives() -> None:
    ranks = server(2)
    ranks[0].route(0, IDS)
    ranks[1].route(0, [[4, 5], [6, 0]])
    state = State()
    seen = scraped(state)
    assert seen.by("rank", "received_assignments_total", layer=ranks[0].specs[0].name) == {
        "0": 6,
        "1": 4,
    }
    work(ranks[:1], tokens=8)
    assert sum(scraped(state).of("received_assignments_total").values()) == 10 + 2 * 8 * 2


@pytest.mark.parametrize("why", ["a rank is missing", "ranks do not divide experts"])
def test_what_a_rank_receives_is_absent_where_it_cannot_be_known(why: str) -> None:
    ranks = server(3, num_experts=6 if "missing" in why else 8)
    for rank in ranks[: 2 if "missing" in why else 3]:
        rank.route(0, IDS[:2])
    if "missing" in why:
        ranks.pop().path.unlink()
    seen = scraped(State())
    assert seen.of("tokens_total")
    assert seen.of("received_assignments_total") == {}


# Where experts 0 to 7 lie on two ranks: in runs, the other way round, and with replicas of 0 and 1.
RUNS, TURNED = [*range(8)], [*range(7, -1, -1)]
DOUBLED = [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]


@pytest.mark.parametrize("grouped", [True, False])
def test_received_assignments_follow_the_placement(grouped: bool) -> None:
    room = PlacementSpec(10, 2)
    group = (0, 1) if grouped else ()
    ranks = [Served(r, group, layers=1, placements=room, world_size=2) for r in (0, 1)]
    layer, state = ranks[0].specs[0].name, State()

    def received() -> dict[str, float]:
        return scraped(state).by("rank", "received_assignments_total", layer=layer)

    def change(slots: list[int]) -> None:
        for rank in ranks:
            rank.recorder.record_placement({0: slots}, 2)

    change(RUNS)
    ranks[0].route(0, [[0, 1], [0, 7]])
    ranks[1].route(0, [[2, 3]])
    assert received() == {"0": 5, "1": 1}
    change(TURNED)
    ranks[0].route(0, [[0, 1], [0, 7]])
    assert received() == {"0": 5 + 1, "1": 1 + 3}
    ranks[0].route(0, [[0, 1]])
    change(DOUBLED)
    ranks[1].route(0, [[0, 1], [0, 7], [0, 3]])
    # Of three 0 and one 1, half each; 3 is on the first rank, 7 on the second.
    assert received() == {"0": 6 + 2 + 1, "1": 4 + 2 + 2 + 1}
    changes = scraped(state).by("rank", "placement_changes_total")
    assert changes == {"0": 2, "1": 2}


@pytest.mark.parametrize("read", ["snapshot", "placements"])
def test_passes_counted_while_it_looks_are_not_those_of_the_placement_before(
    read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, state = Served(layers=1, placements=PlacementSpec(8, 2), world_size=2), State()
    twin = Served(1, layers=1, placements=PlacementSpec(8, 2), world_size=2)
    for rank in (made, twin):
        rank.recorder.record_placement({0: RUNS}, 2)
    received = {"0": 1.0, "1": 1.0}
    made.route(0, [[0, 7]])
    assert scraped(state).by("rank", "received_assignments_total") == received
    real, late = getattr(dodoco.Reader, read), [made]

    def reads(reader: dodoco.Reader, *known: object) -> object:
        if late and reader.path == made.path:
            late.pop().recorder.record_placement({0: TURNED}, 2)
            made.route(0, [[0, 1]])
        return real(reader, *known)

    monkeypatch.setattr(dodoco.Reader, read, reads)
    scraped(state)
    assert not late, "the map changed in the middle of a look"
    assert scraped(state).by("rank", "received_assignments_total") == {"0": 1, "1": 3}


def test_what_lies_under_placements_that_are_gone_is_left_out() -> None:
    made = Served(layers=1, placements=PlacementSpec(8, 2), world_size=1)
    for slots in (RUNS, TURNED, RUNS):
        made.recorder.record_placement({0: slots}, 1)
        made.route(0, [[0, 1]])
    assert scraped(State()).one("received_assignments_total") == 4
    assert scraped(State()).one("tokens_total") == 3


@pytest.mark.parametrize("why", ["a rank without placements", "other ranks than the run's"])
def test_placements_that_say_too_little_say_nothing(why: str) -> None:
    room = PlacementSpec(8, 2)
    ranks = [Served(0, layers=1, placements=room, world_size=2)]
    ranks.append(Served(1, layers=1, placements=room if "other" in why else None, world_size=2))
    for rank in ranks:
        if rank.recorder.placements:
            rank.recorder.record_placement({0: RUNS}, 4 if "other" in why else 2)
        rank.route(0, IDS[:2])
    assert scraped(State()).of("received_assignments_total") == {}


def test_passes_are_counted_by_size_and_max_over_mean_over_all_ranks() -> None:
    ranks = server(2, layers=1)
    sizes = [1, 8, 63, 64, 300, 1500]
    for rank in ranks:
        for number, size in enumerate(sizes):
            rank.route_all(size, seed=number + 10 * rank.rank, skew=number / 2)
    seen = scraped(State())
    peaks: dict[str, list[float]] = {name: [] for name, *_ in PASS_SIZES}
    for rank in ranks:
        for record in dodoco.Reader(rank.path).records():
            row = int(record["tokens"]).bit_length() - 1
            (name,) = (name for name, first, end in PASS_SIZES if first <= row < end)
            peaks[name].append(8 * record["max_count"] / record["assignments"])
    assert [len(found) for found in peaks.values()] == [6, 4, 2]
    for name, found in peaks.items():
        labels = {"pass_tokens": name, "model_name": "tiny", "layer": "model.layers.0.mlp.gate"}
        buckets = seen.by("le", "pass_max_over_mean_bucket", **labels)
        assert buckets.pop("+Inf") == seen.one("pass_max_over_mean_count", **labels) == len(found)
        assert buckets == {str(b): sum(peak < b for peak in found) for b in BUCKETS}
    assert "dodoco_pass_max_over_mean_sum" not in seen


def test_series_on_request() -> None:
    ranks = server(2, layers=1)
    work(ranks)
    plain, more = scraped(State()), scraped(State(), *OPTIONS)
    counts = sum(dodoco.Reader(rank.path).snapshot().layers[0].counts for rank in ranks)
    experts = more.by("expert", "expert_assignments_total")
    assert experts == {str(e): int(n) for e, n in enumerate(np.asarray(counts))}
    rows = more.of("alltoall_rows_total", op="dispatch", source=1)
    sent = dodoco.Reader(ranks[1].path).traffic()[0].sent
    assert list(rows.values()) == sent.tolist()
    for name in ("layer_alltoall_seconds_total", "layer_alltoall_bytes_total"):
        total = name.removeprefix("layer_")
        assert sum(more.of(name).values()) == pytest.approx(sum(more.of(total).values()))
    for metric in METRICS:
        if metric.option:
            assert plain.of(metric.name) == {}


def test_faults_are_counted_by_reason() -> None:
    made = Served()
    for fault in (_C.Fault.BAD_SHAPE, _C.Fault.TOO_LARGE, _C.Fault.BAD_SHAPE):
        made.recorder.add_fault(fault)
    seen = scraped(State()).by("reason", "recorder_faults_total")
    assert {reason for reason, number in seen.items() if number} == {"bad_shape", "too_large"}
    assert (seen["bad_shape"], seen["too_large"]) == (2, 1)
    assert set(seen) == {name.lower() for name in _C.Fault.__members__ if name != "NONE"} | {
        "other"
    }


def test_faults_of_an_older_writer_have_no_reason() -> None:
    made = Served()
    for _ in range(3):
        made.recorder.add_fault(_C.Fault.BAD_SHAPE)
    with made.path.open("r+b") as file:  # as all of these bytes were reserved
        file.seek(104)
        file.write(bytes(128))
    seen = scraped(State()).by("reason", "recorder_faults_total")
    assert {reason: number for reason, number in seen.items() if number} == {"other": 3}


def test_every_series_is_one_of_the_table_with_its_labels() -> None:
    state, ranks = State(), server(2)
    state.update()
    work(ranks)
    seen = scraped(state, *OPTIONS)
    table = {m.full_name: set(m.labels) for m in METRICS if m.kind != "histogram"}
    histogram = next(m for m in METRICS if m.kind == "histogram")
    table[histogram.full_name + "_bucket"] = {*histogram.labels, "le"}
    table[histogram.full_name + "_count"] = set(histogram.labels)
    windows = {name for name in table if "_window_" in name}
    assert set(seen) == set(table) - windows
    for name, found in seen.items():
        assert all({key for key, _ in series} == table[name] for series in found)


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
        if metric.unit in ("seconds", "bytes"):
            assert f"_{metric.unit}" in metric.name
        assert {"run", "pid"}.isdisjoint(metric.labels) or metric.kind == "info"


def test_the_documented_table_is_the_one_in_the_code() -> None:
    assert reference() in DOCS.read_text()


def test_labels_of_any_text_are_exposed_as_prometheus_client_would() -> None:
    odd = 'back\\slash "quotes"\nline \ud800 ' + "x" * 300
    made = [
        Served(labels={"model_name": odd}, layers=2),
        Served(labels={"model_name": "tiny", "ep_group": "blue"}),
    ]
    for each in made:
        each.route_all(4)
    registry = registry_of(State(), OPTIONS)
    text = render(registry).decode()
    # last_pass and the like are those of the same moment: nothing has been recorded in between.
    assert text == generate_latest(registry).decode()
    groups = scraped(State()).by("ep_group", "recorder_up", model_name="tiny")
    assert groups == {"blue": 1}


@pytest.mark.parametrize(
    ("ranks", "named"),
    [((3,), "ep:3"), ((4, 5, 6), "ep:4-6"), ((0, 2), "ep:0,2"), (tuple(range(0, 64, 2)), "ep:")],
)
def test_a_group_is_named_after_its_ranks(ranks: tuple[int, ...], named: str) -> None:
    made = Served(ranks[0], ranks, world_size=64)
    (group,) = scraped(State()).by("ep_group", "recorder_up")
    assert group.startswith(named)
    assert len(group) < 20
    assert (group == named) == (named != "ep:")
    made.close()


def test_sixty_one_layers_of_256_experts_on_eight_ranks_are_under_4000_series() -> None:
    ranks = server(8, layers=61, num_experts=256, top_k=8, max_bytes=8 << 20)
    clock = Clock()
    state = State(window_s=60, clock=clock)
    for _ in range(3):
        for tokens in (4, 64, 1024):  # passes of every size class
            work(ranks, tokens=tokens)
        clock.pass_by(60)
        state.update()
    seen = scraped(state)
    assert len(seen.of("window_gini_corrected")) == 61
    assert len(seen.of("pass_max_over_mean_count")) == 3 * 61
    assert len(seen.of("alltoall_wait_seconds_total")) == 16
    assert seen.num_series < 4000
