"""What a reader gives back: snapshots, windows, records in order, and clear refusals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
import dodoco_ext as dodoco
from dodoco_ext import _C, metrics, reference
from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.recording import RECORD_DTYPE, Reader

# The ring of a small recording has few slots, so that it laps soon.
TINY_BYTES = 48 << 10
IDS = np.array([[0, 1], [1, 2], [-1, 9]])


@pytest.fixture
def probe() -> Iterator[cases.Probe]:
    opened = cases.Probe.open((4, 2), (8, 2), (60, 2), max_bytes=1 << 18)
    yield opened
    opened.recorder.close()


def one_token(number: int) -> cases.Array:
    """A pass that can be told from its neighbours: as many tokens as its number."""
    return np.full((number, 1), number % 4, np.int16)


# --- iterations --------------------------------------------------------------------------------


def test_a_layer_not_above_the_last_one_starts_the_next_iteration(probe: cases.Probe) -> None:
    for layer in (0, 1, 2, 0, 2, 1, 1, 0):
        probe.record_ids(IDS, layer)
    records = probe.reader.records()
    assert records["layer"].tolist() == [0, 1, 2, 0, 2, 1, 1, 0]
    assert records["iteration"].tolist() == [0, 0, 0, 1, 1, 2, 3, 4]


def test_disabled_and_faulty_passes_advance_the_iteration(probe: cases.Probe) -> None:
    """Or ranks, of which one was disabled for a while, would drift apart."""
    probe.record_ids(IDS, 0)
    probe.recorder.lane.enabled = False
    assert [probe.record_ids(IDS, layer) for layer in (0, 1, 0)] == [1, 1, 1]
    probe.recorder.lane.enabled = True
    probe.record_ids(IDS, 1)
    assert probe.record_ids(np.zeros((1, 5), np.int64), 0) < 0
    probe.record_ids(IDS, 1)
    assert probe.reader.records()["iteration"].tolist() == [0, 2, 3]
    assert [layer.passes for layer in probe.snapshot().layers] == [1, 2, 0]


def test_recomputed_passes_are_counted_apart_and_move_nothing(probe: cases.Probe) -> None:
    probe.record_ids(IDS, 1)
    assert probe.record_ids(IDS, 0, recomputed=True) == 1
    assert probe.record_ids(IDS, 1, recomputed=True) == 1
    probe.record_ids(IDS, 2)
    assert [layer.recomputed for layer in probe.snapshot().layers] == [1, 1, 0]
    assert [layer.passes for layer in probe.snapshot().layers] == [0, 1, 1]
    assert probe.reader.records()["iteration"].tolist() == [0, 0]


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_record_every_thins_ring_and_histograms_but_never_the_board(every: int) -> None:
    probe = cases.Probe.open((4, 2), (4, 2), max_bytes=1 << 18)
    probe.recorder.lane.record_every = every
    iterations = 10
    for _ in range(iterations):
        for layer in (0, 1):
            probe.record_ids(IDS, layer)
    kept = range(0, iterations, every)
    assert probe.reader.records()["iteration"].tolist() == [i for i in kept for _ in (0, 1)]
    expected = reference.route_ids(IDS, 4)
    for layer in probe.snapshot().layers:
        assert (layer.passes, layer.recorded_passes) == (iterations, len(kept))
        assert layer.gini_histogram.sum() == layer.max_over_mean_histogram.sum() == len(kept)
        np.testing.assert_array_equal(layer.counts, expected.counts * iterations)
    probe.recorder.close()


def test_a_pass_without_tokens_is_a_pass(probe: cases.Probe) -> None:
    for ids in (np.zeros((0, 2), np.int64), np.full((3, 2), -1)):
        probe.record_ids(ids)
    layer = probe.snapshot().layers[0]
    assert (layer.passes, layer.tokens, layer.assignments, layer.padded) == (2, 0, 0, 6)
    assert np.isnan(layer.gini)
    assert np.isnan(layer.max_over_mean)


# --- the ring ----------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> Iterator[cases.Probe]:
    opened = cases.Probe.open((4, 1), max_bytes=TINY_BYTES)
    assert 64 <= opened.reader.num_slots <= 256
    yield opened
    opened.recorder.close()


@pytest.mark.parametrize("laps", [0, 1, 3])
@pytest.mark.parametrize("more", [-1, 0, 1, 17])
def test_a_lapped_ring_keeps_the_newest_and_counts_the_lost(
    tiny: cases.Probe, laps: int, more: int
) -> None:
    slots = tiny.reader.num_slots
    total = max(laps * slots + more, 0)
    for number in range(total):
        tiny.record_ids(one_token(number))
    records, cursor, lost = tiny.reader.read()
    kept = min(total, slots)
    assert lost == total - kept
    assert records["iteration"].tolist() == list(range(total - kept, total))
    for record in records:
        expected = reference.route_ids(one_token(int(record["iteration"])), 4)
        cases.assert_record_is(record, expected)
    assert cursor == (total,) == tiny.reader.cursor()
    assert tiny.snapshot().layers[0].passes == total
    np.testing.assert_array_equal(tiny.reader.records(), records)


def test_a_cursor_misses_nothing_and_repeats_nothing(tiny: cases.Probe) -> None:
    rng = np.random.default_rng(0)
    slots, number, lost = tiny.reader.num_slots, 0, 0
    seen: list[int] = []
    cursor = tiny.reader.cursor()
    for _ in range(60):
        for _ in range(rng.integers(0, slots // 2)):
            tiny.record_ids(one_token(number))
            number += 1
        records, cursor, missed = tiny.reader.read(cursor)
        seen += records["iteration"].tolist()
        lost += missed
    assert number > 3 * slots
    assert lost == 0
    assert seen == list(range(number))
    assert len(tiny.reader.read(cursor)[0]) == 0


def test_a_reader_that_is_too_slow_knows_how_much_it_missed(tiny: cases.Probe) -> None:
    slots = tiny.reader.num_slots
    for number in range(10):
        tiny.record_ids(one_token(number))
    cursor = tiny.reader.cursor()
    for number in range(10, 10 + slots + 5):
        tiny.record_ids(one_token(number))
    records, cursor, lost = tiny.reader.read(cursor)
    assert lost == 5
    assert records["iteration"].tolist() == list(range(15, 15 + slots))
    assert tiny.reader.read(cursor)[2] == 0


def test_readers_do_not_disturb_each_other(tiny: cases.Probe) -> None:
    other = Reader(tiny.path)
    tiny.record_ids(one_token(1))
    _, cursor, _ = tiny.reader.read()
    tiny.record_ids(one_token(2))
    assert len(other.records()) == 2
    assert len(tiny.reader.read(cursor)[0]) == 1


def test_records_stay_readable_after_the_end(tiny: cases.Probe) -> None:
    for number in range(3):
        tiny.record_ids(one_token(number))
    cursor = tiny.reader.cursor()
    tiny.record_ids(one_token(3))
    tiny.recorder.close()
    assert tiny.reader.read(cursor)[0]["iteration"].tolist() == [3]
    assert len(Reader(tiny.path).records()) == 4


def test_a_cursor_of_another_shape_is_refused(tiny: cases.Probe) -> None:
    with pytest.raises(InputError, match="is not of this recording"):
        tiny.reader.read((0, 0))


def test_a_record_says_what_when_and_where(probe: cases.Probe) -> None:
    probe.recorder.lane.microbatch = 7
    before = time.time_ns()
    probe.record_ids(IDS, 2)
    after = time.time_ns()
    (record,) = probe.reader.records()
    assert record.dtype == RECORD_DTYPE
    # The two clocks were read one after the other, once: a busy machine may pause in between.
    assert before - 10**9 <= int(record["time_ns"]) <= after + 10**9
    names = ("type", "lane", "direction", "recompute", "layer", "microbatch", "map_version")
    assert [int(record[name]) for name in names] == [1, 0, 0, 0, 2, 7, 0]
    cases.assert_record_is(record, reference.route_ids(IDS, 60))
    gini = metrics.gini_from_numerator(record["gini_numerator"], record["assignments"], 60)
    assert gini == metrics.gini(reference.route_ids(IDS, 60).counts)


# --- snapshots ---------------------------------------------------------------------------------


def test_a_snapshot_gives_every_counter_and_metric(probe: cases.Probe) -> None:
    assert probe.record_ids(IDS, 1) == 0
    layers = probe.snapshot().layers
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert [layer.name for layer in layers] == [f"layers.{i}.router" for i in range(3)]
    assert [(layer.num_experts, layer.top_k) for layer in layers] == [(4, 2), (8, 2), (60, 2)]
    layer = layers[1]
    cases.assert_layer_is(layer, reference.route_ids(IDS, 8))
    assert layer.counts.dtype == np.uint64
    for name in ("gini", "max_over_mean", "balancedness", "cv", "normalized_entropy"):
        assert getattr(layer, name) == float(getattr(metrics, name)(layer.counts))
    assert layer.unused_experts == 5
    assert layers[0].passes == layers[2].passes == 0


def test_a_snapshot_is_a_copy(probe: cases.Probe) -> None:
    snapshot = probe.snapshot()
    probe.record_ids(IDS)
    assert snapshot.layers[0].counts.sum() == 0
    assert snapshot.layers[0].counts.base is None


def test_a_difference_is_what_happened_in_between(probe: cases.Probe) -> None:
    probe.record_ids(IDS)
    before = probe.snapshot()
    probe.record_ids(np.array([[3, 2]]))
    probe.record_ids(np.array([[3, 1]]))
    after = probe.snapshot()
    window = after - before
    layer = window.layers[0]
    assert layer.counts.tolist() == [0, 1, 1, 2]
    assert (layer.passes, layer.tokens, layer.assignments, layer.padded) == (2, 2, 4, 0)
    assert layer.gini_histogram.sum() == layer.recorded_passes == 2
    assert layer.gini == metrics.gini([0, 1, 1, 2])
    assert (window.start_ns, window.time_ns) == (before.time_ns, after.time_ns)
    assert before.start_ns <= before.time_ns <= after.time_ns
    assert (after - after).layers[0].passes == 0


def test_snapshots_of_two_recordings_cannot_be_subtracted(probe: cases.Probe) -> None:
    other = cases.Probe.open((4, 2), (8, 2), (60, 2))
    with pytest.raises(InputError, match="two recordings") as caught:
        _ = probe.snapshot() - other.snapshot()
    assert "\n" not in str(caught.value)
    other.recorder.close()


def test_an_earlier_snapshot_cannot_lose_a_later_one(probe: cases.Probe) -> None:
    before = probe.snapshot()
    probe.record_ids(IDS)
    with pytest.raises(InputError, match="swap"):
        _ = before - probe.snapshot()


def test_a_snapshot_minus_anything_else_is_a_type_error(probe: cases.Probe) -> None:
    with pytest.raises(TypeError):
        _ = probe.snapshot() - 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = probe.snapshot().layers[0] - 1  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_a_snapshot_becomes_a_table(kind: str, probe: cases.Probe) -> None:
    pytest.importorskip({"arrow": "pyarrow", "pandas": "pandas"}[kind])
    probe.record_ids(IDS, 1)
    snapshot = probe.snapshot()
    frame = {"arrow": snapshot.to_arrow, "pandas": snapshot.to_pandas}[kind]()
    rows = frame.to_pylist() if kind == "arrow" else frame.to_dict("records")
    assert len(rows) == 3
    for row, layer in zip(rows, snapshot.layers, strict=True):
        assert list(row["counts"]) == layer.counts.tolist()
        for name in ("name", "passes", "tokens", "assignments", "padded", "invalid"):
            assert row[name] == getattr(layer, name)
        assert row["unused_experts"] == layer.unused_experts
    assert rows[1]["gini"] == snapshot.layers[1].gini


@pytest.mark.parametrize("library", ["pyarrow", "pandas"])
def test_a_missing_library_is_named(
    library: str, probe: cases.Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    snapshot = probe.snapshot()
    with pytest.raises(DodocoError, match=r"pip install 'dodoco-ext\[trace\]'"):
        snapshot.to_arrow() if library == "pyarrow" else snapshot.to_pandas()


def test_several_lanes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "lanes.dodoco"
    metadata = '{"layers": [{"name": "a"}, {"name": "b"}]}'
    writer = _C.RecordingWriter(str(path), metadata, [(4, 2), (8, 2)], num_lanes=3)
    sites = [[np.zeros(8, np.uint64) for _ in range(2)] for _ in range(3)]
    for lane, of_lane in enumerate(sites):
        for layer, site in enumerate(of_lane):
            writer.bind_site(site.ctypes.data, lane, layer)
    ids = np.array([[0, 1]])
    strides = (2, 1)
    for lane in (0, 2, 2):
        site = sites[lane][1]
        _C.route_ids(site.ctypes.data, ids.ctypes.data, 8, *ids.shape, *strides, False)
    reader = Reader(path)
    assert [layer.passes for layer in reader.snapshot().layers] == [0, 3]
    assert reader.snapshot().layers[1].counts.tolist() == [3, 3] + [0] * 6
    records, cursor, _ = reader.read()
    assert cursor == (1, 0, 2)
    assert records["lane"].tolist() == [0, 2, 2]
    assert (np.diff(records["time_ns"].astype(np.int64)) >= 0).all()
    writer.close()


def test_the_public_names_open_recordings(probe: cases.Probe) -> None:
    assert isinstance(dodoco.open(probe.path), dodoco.Reader)
    assert isinstance(probe.snapshot(), dodoco.Snapshot)
    assert isinstance(probe.snapshot().layers[0], dodoco.LayerSnapshot)
