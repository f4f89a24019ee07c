"""Where experts lie, as it is recorded at each change, and what each rank received under it."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dodoco_ext import _C
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.placements import LayerPlacements, Placement, Placements
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from test_damage import patched, section

PACKAGE = str(Path(_C.__file__).parent.parent)


class Placed:
    """An open recording of layers of E = 4, k = 2, with room for 6 slots a layer."""

    def __init__(self, layers: int = 2, kept: int = 4, lanes: int = 1) -> None:
        specs = [LayerSpec(f"layers.{i}", 4, 2) for i in range(layers)]
        room = PlacementSpec(6, kept)
        self.recorder = Recorder(specs, placements=room, lanes=lanes)
        self.reader = Reader(self.recorder.path)
        self._sites = [np.zeros(_C.SITE_BYTES // 8, np.int64) for _ in specs]
        for index, site in enumerate(self._sites):
            self.recorder.bind(index, site, site.ctypes.data)

    def route(self, ids: list[list[int]], layer: int = 0) -> None:
        array = np.array(ids, np.int64)
        rows, k = array.shape
        site, data = self._sites[layer].ctypes.data, array.ctypes.data
        assert _C.route_ids(site, data, 8, rows, k, k, 1, False) == 0

    def placements(self) -> Placements:
        found = self.reader.placements()
        assert found is not None
        return found

    def counts(self, layer: int = 0) -> np.ndarray:
        return self.reader.snapshot().layers[layer].counts


# --- what is recorded --------------------------------------------------------------------------


def test_each_change_is_kept_with_what_had_been_counted() -> None:
    made = Placed()
    before_ns = time.time_ns()
    assert made.recorder.record_placement({0: [0, 1, 2, 3], 1: [3, 2, 1, 0, 0, -1]}, 2) == 0
    made.route([[0, 1], [0, 2]])
    assert made.recorder.record_placement({0: [0, 1, 2, 3, 0, 0]}, 2, [1, 0, 0, 1, 1, 0]) == 1
    found = made.placements()
    assert (found.changes, found.recorded) == (1, 2)
    first, second = found.layers[0].kept
    assert (first.version, first.num_ranks) == (0, 2)
    assert first.experts.tolist() == [0, 1, 2, 3]
    assert first.ranks.tolist() == [0, 0, 1, 1]
    assert first.counts.tolist() == [0, 0, 0, 0]
    assert second.version == 1
    assert second.ranks.tolist() == [1, 0, 0, 1, 1, 0]
    assert second.counts.tolist() == [2, 1, 1, 0]
    (other,) = found.layers[1].kept
    assert other.experts.tolist() == [3, 2, 1, 0, 0, -1]
    assert other.ranks.tolist() == [0, 0, 0, 1, 1, -1]
    assert other.replicas.tolist() == [2, 1, 1, 1]
    assert (
        before_ns - 10**8
        < first.time_ns
        <= second.time_ns
        <= found.last_ns
        < time.time_ns() + 10**8
    )


def test_records_carry_the_version_they_were_made_under() -> None:
    made = Placed(lanes=3)
    made.recorder.record_placement({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, 2)
    made.route([[0, 1]])
    made.route([[0, 1]], layer=1)
    made.recorder.record_placement({1: [3, 2, 1, 0]}, 2)
    with made.recorder.use_lane(2):
        made.route([[0, 1]])
        made.route([[0, 1]], layer=1)
    records = made.reader.records()
    assert records["map_version"].tolist() == [0, 0, 1, 1]
    layers = made.placements().layers
    under = [layers[r["layer"]].at(int(r["map_version"])) for r in records]
    assert [p.version for p in under if p] == [0, 0, 0, 1]


def test_the_iteration_is_that_of_the_latest_record() -> None:
    made = Placed()
    for _ in range(5):
        made.route([[0, 1]])
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    (placement,) = made.placements().layers[0].kept
    assert placement.iteration == made.reader.records()["iteration"].max()


def test_the_latest_are_kept_and_all_are_counted() -> None:
    made = Placed(layers=1, kept=3)
    for n in range(10):
        made.recorder.record_placement({0: [n % 4] * (n % 6 + 1)}, 1)
    found = made.placements()
    assert found.changes == 9
    assert [p.version for p in found.layers[0].kept] == [7, 8, 9]
    assert [len(p.experts) for p in found.layers[0].kept] == [2, 3, 4]
    assert found.layers[0].lost == 7
    assert found.layers[0].at(6) is None


def test_nothing_is_read_again_where_nothing_changed() -> None:
    made = Placed()
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    found = made.placements()
    assert made.reader.placements(found) is found
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    later = made.reader.placements(found)
    assert later is not None
    assert later is not found
    assert later.layers[0].kept[0] is found.layers[0].kept[0]


def test_other_recordings_have_no_room_for_it_and_do_not_grow() -> None:
    plain = Recorder([LayerSpec("a", 4, 2)])
    assert Reader(plain.path).placements() is None
    with pytest.raises(InputError, match="no room for placements: create it with placements="):
        plain.record_placement({0: [0, 1, 2, 3]}, 1)
    kinds = struct.unpack("<" + "I36x" * 8, plain.path.read_bytes()[248 : 248 + 320])
    assert 5 not in kinds


def test_after_the_end_nothing_is_recorded() -> None:
    made = Placed()
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    made.recorder.close()
    assert made.recorder.record_placement({0: [0, 1, 2, 3]}, 1) == -1
    assert made.placements().recorded == 1


def test_of_threads_that_place_experts_the_last_version_is_the_one_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, real = Placed(), Recorder.set
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    second = threading.Thread(
        target=made.recorder.record_placement, args=({0: [3, 2, 1, 0]}, 1), daemon=True
    )

    def late(recorder: Recorder, name: str, value: int) -> None:
        if value == 1:  # the other thread begins, and must wait for its turn
            second.start()
            second.join(0.3)
        real(recorder, name, value)

    monkeypatch.setattr(Recorder, "set", late)
    made.recorder.record_placement({0: [1, 0, 2, 3]}, 1)
    second.join(30)
    assert made.placements().changes == made.recorder.get("map_version") == 2


def test_a_child_forked_while_a_thread_places_experts_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, ended = Placed(), []
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)

    def forks(*_: object) -> None:
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)  # a child that waits is ended by it
            os._exit(made.recorder.record_placement({0: [3, 2, 1, 0]}, 1) + 1)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    monkeypatch.setattr(Recorder, "set", forks)  # called under the lock
    made.recorder.record_placement({0: [1, 0, 2, 3]}, 1)
    assert ended == [0]


def test_a_forked_child_records_nothing() -> None:
    made = Placed()
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 1)
    pid = os.fork()
    if pid == 0:
        os._exit(made.recorder.record_placement({0: [3, 2, 1, 0]}, 1) + 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made.placements().recorded == 1


WRONG: dict[str, tuple[Callable[[Recorder], object], str]] = {
    "layer": (lambda r: r.record_placement({2: [0, 1]}, 1), "no layer 2"),
    "negative layer": (lambda r: r.record_placement({-1: [0, 1]}, 1), "no layer -1"),
    "slots": (lambda r: r.record_placement({0: [0] * 7}, 1), "7 physical experts.*room for 6"),
    "expert": (lambda r: r.record_placement({0: [4]}, 1), "expert 4 on rank 0"),
    "below -1": (lambda r: r.record_placement({0: [-2]}, 1), "slot 0: expert -2"),
    "ranks": (lambda r: r.record_placement({0: [0, 1, 2]}, 2), "do not divide 3 slots"),
    "no ranks": (lambda r: r.record_placement({0: [0, 1]}, 0), "on 0 ranks"),
    "rank": (lambda r: r.record_placement({0: [0, 1]}, 2, [0, 2]), "rank 2 of 2"),
    "fewer ranks": (lambda r: r.record_placement({0: [0, 1]}, 2, [0]), "of 2 slots"),
    "floats": (lambda r: r.record_placement({0: [0.5]}, 1), "give integers"),
    "a table": (lambda r: r.record_placement({0: [[0]]}, 1), "give integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    made = Placed()
    change, complaint = WRONG[name]
    with pytest.raises(InputError, match=complaint) as caught:
        change(made.recorder)
    assert "\n" not in str(caught.value)
    assert made.placements().recorded == 0


@pytest.mark.parametrize("room", [(0, 4), (65537, 4), (6, 1), (6, 1025)])
def test_impossible_room_is_refused(room: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"give [12] to"):
        Recorder([LayerSpec("a", 4, 2)], placements=PlacementSpec(*room))


# --- what each rank received -------------------------------------------------------------------


def test_without_replicas_it_is_exact_change_by_change() -> None:
    made = Placed(layers=1)
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 2)
    made.route([[0, 1], [0, 2]])
    made.recorder.record_placement({0: [3, 2, 1, 0]}, 2)
    made.route([[0, 1], [0, 3]])
    found = made.placements().layers[0].received(made.counts())
    # 0 0 1 and 2 before the change; 0 0 1 and 3 after it.
    assert found.loads.tolist() == [3 + 1, 1 + 3]
    assert (found.estimated, found.unplaced) == (0, 0)


def test_replicas_share_evenly_and_that_is_called_an_estimate() -> None:
    made = Placed(layers=1)
    made.recorder.record_placement({0: [0, 1, 2, 3, 0, 0]}, 3)
    made.route([[0, 1], [0, 2], [0, 3]])
    found = made.placements().layers[0].received(made.counts())
    assert found.loads.tolist() == [1 + 1, 2, 2]
    assert (found.estimated, found.unplaced) == (3, 0)


def test_replicas_on_one_rank_are_no_estimate() -> None:
    made = Placed(layers=1)
    made.recorder.record_placement({0: [0, 0, 1, 2, 3, -1]}, 2)
    made.route([[0, 1], [0, 2], [0, 3]])
    found = made.placements().layers[0].received(made.counts())
    assert found.loads.tolist() == [4, 2]
    assert found.estimated == 0


def test_a_window_is_what_lies_between_two_moments() -> None:
    made = Placed(layers=1)
    made.recorder.record_placement({0: [0, 1, 2, 3]}, 2)
    made.route([[0, 1], [0, 2]])
    before = made.counts()
    made.route([[0, 1]])
    made.recorder.record_placement({0: [3, 2, 1, 0]}, 2)
    made.route([[0, 3]])
    layer = made.placements().layers[0]
    assert layer.received(made.counts(), before).loads.tolist() == [2 + 1, 1]
    whole = layer.received(made.counts()).loads - layer.received(before).loads
    assert whole.tolist() == [3, 1]


def test_what_came_before_the_kept_ones_is_unplaced() -> None:
    made = Placed(layers=1, kept=2)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]):
        made.recorder.record_placement({0: order}, 2)
        made.route([[0, 1]])
    found = made.placements().layers[0].received(made.counts())
    assert found.loads.tolist() == [2, 2]
    assert found.unplaced == 2


def test_what_came_before_the_only_one_is_unplaced() -> None:
    slots, ranks = np.array([0, 1], np.int32), np.array([0, 1], np.int16)
    only = Placement(5, 0, 0, 2, slots, ranks, np.array([3, 1], np.uint64))
    layer = LayerPlacements((only,), 4)
    found = layer.received(np.array([5, 2], np.uint64))
    assert (found.loads.tolist(), found.unplaced) == ([2, 1], 4)
    found = layer.received(np.array([5, 2], np.uint64), np.array([4, 1], np.uint64))
    assert (found.loads.tolist(), found.unplaced) == ([1, 1], 0)
    none = LayerPlacements((), 0).received(np.array([5, 2], np.uint64))
    assert (none.loads.tolist(), none.unplaced) == ([0], 7)


def test_an_expert_in_no_slot_is_unplaced() -> None:
    made = Placed(layers=1)
    made.recorder.record_placement({0: [0, 1, 2, -1]}, 2)
    made.route([[0, 3]])
    found = made.placements().layers[0].received(made.counts())
    assert found.loads.tolist() == [1, 0]
    assert found.unplaced == 1


@given(st.data())
def test_loads_are_those_of_routing_and_moving_in_any_order(data: st.DataObject) -> None:
    """Without replicas exactly; with them, whatever is not estimated is where it was."""
    num_ranks = data.draw(st.integers(1, 3), "ranks")
    kept, counts, exact, split = [], np.zeros(4, np.uint64), np.zeros(3), 0
    where = np.zeros((4, 3))
    for version in range(data.draw(st.integers(1, 5), "changes")):
        experts = np.array([*data.draw(st.permutations(range(4))), 0], np.int32)
        ranks = np.array(data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=5, max_size=5)))
        kept.append(
            Placement(version, 0, 0, num_ranks, experts, ranks.astype(np.int16), counts.copy())
        )
        where = np.zeros((4, 3))
        np.add.at(where, (experts, ranks), 1)
        part = np.array(data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4)), np.uint64)
        counts = counts + part
        exact += part @ (where / where.sum(axis=1, keepdims=True))
        split += int(part[(where > 0).sum(axis=1) > 1].sum())
    layer = LayerPlacements(tuple(kept), 0)
    found = layer.received(counts)
    assert found.loads == pytest.approx(exact[:num_ranks])
    assert (found.estimated, found.unplaced) == (split, 0)
    middle = kept[len(kept) // 2].counts
    later = layer.received(counts, middle)
    assert later.loads + layer.received(middle).loads == pytest.approx(found.loads)


def by_the_rule_of_vllm(rows: int, passes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads of 8 ranks, of random routing in passes of so many rows: by vLLM's choice of replicas, and as estimated.

    64 experts, of which the 16 busiest have two replicas on different ranks; top 4.
    """
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(64), np.arange(16)])
    slots, ranks = slots.astype(np.int32), (np.arange(80) // 10).astype(np.int16)
    placement = Placement(0, 0, 0, 8, slots, ranks, np.zeros(64, np.uint64))
    places = [np.flatnonzero(slots == e) for e in range(64)]
    popular = np.where(np.arange(64) < 16, 3.0, 1.0)
    true, counts = np.zeros(8), np.zeros(64, np.uint64)
    for _ in range(passes):
        scores = np.log(popular) + rng.gumbel(size=(rows, 64))
        for row, experts in enumerate(np.argsort(-scores, axis=1)[:, :4]):
            for expert in experts:
                hashed = row * 2654435769 & 0xFFFFFFFF
                true[ranks[places[expert][hashed % len(places[expert])]]] += 1
                counts[expert] += np.uint64(1)
    found = LayerPlacements((placement,), 0).received(counts)
    assert found.loads.sum() == pytest.approx(true.sum())
    return true, found.loads


@pytest.mark.parametrize(("rows", "limit"), [(1, 2.0), (2, 0.06), (8, 0.06), (256, 0.06)])
def test_an_even_split_against_the_rule_of_vllm(rows: int, limit: float) -> None:
    """vLLM chooses by the row's number in the pass: in passes of one row always the first replica."""
    true, estimated = by_the_rule_of_vllm(rows, 4096 // rows, seed=rows)
    worst = float(np.abs(estimated - true).max() / true.mean())
    print(f"{rows} rows a pass: a rank's load is off by up to {100 * worst:.1f} % of the mean")
    assert worst < limit
    assert rows > 1 or worst > 0.5, "the estimate is wrong there, and the document says so"


# --- killed, damaged ---------------------------------------------------------------------------

KILLED = """
import sys
import numpy as np
from dodoco_ext import _C
path = sys.argv[1]
names = '{"layers": [{"name": "a"}, {"name": "b"}]}'
writer = _C.RecordingWriter(path, names, [(512, 2)] * 2, num_slots=900, kept_placements=3)
version = 0
while True:
    slots = np.full(900, version % 512 | version % 7 << 16, np.uint32)
    version = writer.record_placement([(0, 7, slots), (1, 7, slots)]) + 1
    if version == 10:
        print("ready", flush=True)
"""


@pytest.mark.timeout(120)
def test_a_kill_leaves_whole_placements(tmp_path: Path) -> None:
    """What is read is one of those that were recorded; at most one of each layer is lost."""
    rng = random.Random(20261124)
    for number in range(25):
        path = tmp_path / f"{number}.dodoco"
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.random() / 200)
        child.kill()
        assert child.wait(timeout=60) == -signal.SIGKILL
        child.stdout.close()
        found = Reader(path).placements()
        assert found is not None
        for layer in found.layers:
            assert len(layer.kept) >= 2
            for placement in layer.kept:
                assert set(placement.experts) == {placement.version % 512}
                assert set(placement.ranks) == {placement.version % 7}
            assert found.recorded - 1 <= layer.kept[-1].version <= found.recorded
        versions = [p.version for p in found.layers[0].kept]
        assert versions == sorted(versions)


def with_header(word: int, value: int) -> Callable[[Path], None]:
    """Changes a word of the section's header: 0 slots, 1 kept, 2 bytes of an entry."""
    return lambda path: patched(path, section(path, 5)[1] + 8 * word, struct.pack("<Q", value))


def with_entry(field: int, value: int) -> Callable[[Path], None]:
    """Changes a field of its entry in the section table: 16 bytes, 24 count, 32 stride."""
    return lambda path: patched(path, section(path, 5)[0] + field, struct.pack("<Q", value))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no slots": with_header(0, 0),
    "more slots": with_header(0, 7),
    "endless slots": with_header(0, (1 << 64) - 1),
    "one kept": with_header(1, 1),
    "more kept": with_header(1, 5),
    "endless kept": with_header(1, (1 << 64) - 1),
    "small entries": with_header(2, 8),
    "odd entries": with_header(2, 177),
    "endless entries": with_header(2, (1 << 64) - 8),
    "short": with_entry(16, 63),
    "count": with_entry(24, 3),
    "small stride": with_entry(32, 64),
    "odd stride": with_entry(32, 785),
    "endless stride": with_entry(32, (1 << 64) - 8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_section_is_refused_in_one_line(damage: str) -> None:
    made = Placed()
    made.recorder.record_placement({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, 2)
    path = made.recorder.path
    assert Reader(path).placements() is not None
    DAMAGES[damage](path)
    with pytest.raises(RecordingError, match="impossible placement") as caught:
        Reader(path)
    assert "\n" not in str(caught.value)
    assert caught.value.state == "damaged"


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, None), (5, 0), (5, 1025), (6, 7), (6, 0xFFFFFFFF), (16, 4), (16, 2 << 16), (19, None)],
)
def test_an_impossible_entry_is_left_out(word: int, value: int | None) -> None:
    """An epoch of another lap, a number of ranks or slots, an expert or a rank that cannot be."""
    made = Placed()
    made.recorder.record_placement({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, 2)
    block = section(made.recorder.path, 5)[1] + 64
    at = block + 64 + 8 * word
    change = struct.pack("<I", 9) if value is None else struct.pack("<I", value)
    patched(made.recorder.path, at + 4 * (value is None), change)
    first, second = made.placements().layers
    assert (first.kept, first.lost) == ((), 1)
    assert first.current is None
    assert len(second.kept) == 1


def test_faults_are_counted_by_reason() -> None:
    made = Placed()
    for fault, times in ((_C.Fault.BAD_SHAPE, 2), (_C.Fault.NO_LANE, 3)):
        for _ in range(times):
            made.recorder.add_fault(fault)
    header = made.reader.header
    assert header["num_faults"] == 5
    assert {n: count for n, count in enumerate(header["faults"]) if count} == {2: 2, 8: 3}
