"""Threads that record at the same time: through one lane in turns, or each through its own."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import cases
import dodoco_ext as dodoco
from children import process
from dodoco_ext import _C, reference
from dodoco_ext.errors import InputError
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from toy import ToyModel, some_tokens


def test_two_threads_lose_nothing() -> None:
    probe = cases.Probe.open((64, 4), (8, 2))
    rng = np.random.default_rng(0)
    # Large passes run without the interpreter lock, small ones with it.
    large, small = rng.integers(0, 64, (6000, 4)), rng.integers(0, 8, (3, 2))
    rounds = 200
    barrier = threading.Barrier(3)
    snapshots = []

    def work(ids: cases.Array, layer: int) -> None:
        barrier.wait()
        for _ in range(rounds):
            probe.record_ids(ids, layer)

    threads = [
        threading.Thread(target=work, args=(large, 0)),
        threading.Thread(target=work, args=(large, 0)),
        threading.Thread(target=work, args=(small, 1)),
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        snapshots.append(probe.snapshot())
    for thread in threads:
        thread.join()
    first, second = probe.snapshot().layers
    np.testing.assert_array_equal(
        first.counts, np.bincount(large.ravel(), minlength=64) * 2 * rounds
    )
    np.testing.assert_array_equal(second.counts, np.bincount(small.ravel(), minlength=8) * rounds)
    assert (first.passes, second.passes) == (2 * rounds, rounds)
    records, _, lost = probe.reader.read()
    assert len(records) + lost == 3 * rounds
    # What a reader saw meanwhile was consistent, or marked.
    for snapshot in snapshots:
        for layer in snapshot.layers:
            assert layer.in_flight or int(layer.counts.sum()) == layer.assignments
    probe.recorder.close()


def test_closing_while_another_thread_records() -> None:
    ids = np.random.default_rng(0).integers(0, 64, (6000, 4))
    for _ in range(5):
        probe = cases.Probe.open((64, 4))
        results: list[int] = []

        def work(probe: cases.Probe = probe, results: list[int] = results) -> None:
            while not results or results[-1] == 0:
                results.append(probe.record_ids(ids))

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.02)
        probe.recorder.close()
        thread.join()
        assert results[-1] == 1
        assert probe.snapshot().layers[0].passes == len(results) - 1


# --- lanes --------------------------------------------------------------------------------------

IDS = np.array([[0, 1], [1, 2]])
LANES = 3


class Laned(cases.Probe):
    """A probe of three layers with several lanes."""

    @classmethod
    def make(cls, lanes: int = LANES) -> Laned:
        shapes = [(4, 2), (64, 4), (8, 2)]
        recorder = Recorder(
            [LayerSpec(f"l{i}", E, k) for i, (E, k) in enumerate(shapes)], lanes=lanes
        )
        sites = [np.zeros(_C.SITE_BYTES // 8, np.uint64) for _ in shapes]
        for index, site in enumerate(sites):
            recorder.bind(index, site, site.ctypes.data)
        return cls(recorder, sites, Reader(recorder.path))

    def passes(self, lane: int) -> list[int]:
        """Passes of each layer in one lane."""
        file = _C.RecordingReader(str(self.path))
        return [int(file.board(lane, layer)[0][0]) for layer in range(len(self.sites))]


def test_each_thread_records_through_its_own_lane() -> None:
    probe, rounds = Laned.make(), 300
    rng = np.random.default_rng(0)
    # The second layer's passes run without the interpreter lock: the lanes really are concurrent.
    ids = [
        [rng.integers(0, E, (tokens + lane, 2)) for E, tokens in ((4, 5), (64, 9000), (8, 3))]
        for lane in range(LANES)
    ]
    barrier = threading.Barrier(LANES + 1)

    def work(lane: int) -> None:
        barrier.wait()
        with probe.recorder.use_lane(lane):
            for _ in range(rounds):
                for layer in range(3):
                    probe.record_ids(ids[lane][layer], layer)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(LANES)]
    for thread in threads:
        thread.start()
    barrier.wait()
    snapshots = [probe.snapshot()]
    while any(thread.is_alive() for thread in threads):
        snapshots.append(probe.snapshot())
    snapshots.append(probe.snapshot())
    assert [probe.passes(lane) for lane in range(LANES)] == [[rounds] * 3] * LANES
    for layer, found in enumerate(snapshots[-1].layers):
        expected = sum(
            np.bincount(ids[lane][layer].ravel(), minlength=found.num_experts)
            for lane in range(LANES)
        )
        np.testing.assert_array_equal(found.counts, expected * rounds)
        assert (found.passes, found.in_flight) == (LANES * rounds, False)
    for earlier, later in pairwise(snapshots):
        for before, after in zip(earlier.layers, later.layers, strict=True):
            assert (after.counts >= before.counts).all()
    records, cursor, lost = probe.reader.read()
    assert cursor == (3 * rounds,) * LANES
    assert lost == 0
    for lane in range(LANES):
        mine = records[records["lane"] == lane]
        assert mine["iteration"].tolist() == [i for i in range(rounds) for _ in range(3)]
        assert mine["layer"].tolist() == [0, 1, 2] * rounds
        for record in mine[: 3 * 5]:
            layer = record["layer"]
            expected_pass = reference.route_ids(ids[lane][layer], (4, 64, 8)[layer])
            cases.assert_record_is(record, expected_pass)
    probe.recorder.close()


def test_a_choice_holds_for_its_thread_and_its_recording_only() -> None:
    probe, other = Laned.make(), Laned.make()

    def elsewhere() -> None:
        probe.record_ids(IDS)

    with probe.recorder.use_lane(1):
        probe.record_ids(IDS)
        other.record_ids(IDS)
        with other.recorder.use_lane(2), probe.recorder.use_lane(2):
            probe.record_ids(IDS)
            other.record_ids(IDS)
        probe.record_ids(IDS)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    probe.record_ids(IDS)
    other.record_ids(IDS)
    assert [probe.passes(lane)[0] for lane in range(LANES)] == [2, 2, 1]
    assert [other.passes(lane)[0] for lane in range(LANES)] == [2, 0, 1]
    probe.recorder.close()
    other.recorder.close()


def test_choices_may_end_in_any_order() -> None:
    """As those of coroutines do, that take turns in one thread."""
    probe = Laned.make()
    first, second = probe.recorder.use_lane(1), probe.recorder.use_lane(2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    probe.record_ids(IDS)
    second.__exit__(None, None, None)
    probe.record_ids(IDS)
    assert [probe.passes(lane)[0] for lane in range(LANES)] == [1, 0, 1]
    probe.recorder.close()


def test_a_choice_ends_with_its_block_when_that_raises() -> None:
    probe = Laned.make()
    with pytest.raises(KeyError), probe.recorder.use_lane(1):
        raise KeyError
    probe.record_ids(IDS)
    assert [probe.passes(lane)[0] for lane in range(LANES)] == [1, 0, 0]
    probe.recorder.close()


def test_a_choice_that_ends_in_another_thread_harms_nobody() -> None:
    """A generator that holds one may be collected anywhere, while the thread it was for goes on."""
    with process(
        """
        import ctypes, gc
        from dodoco_ext.recorder import LayerSpec, Recorder

        recorder = Recorder([LayerSpec("a", 4, 2)], lanes=2)
        site = np.zeros(8, np.uint64)
        recorder.bind(0, site, site.ctypes.data)
        probe = cases.Probe(recorder, [site], None)
        held, entered, collected = [], threading.Event(), threading.Event()
        results = []

        def work():
            held.append(recorder.use_lane(1))
            held[0].__enter__()
            entered.set()
            collected.wait()
            results.extend(probe.record_ids(IDS) for _ in range(100))

        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        held.clear()
        gc.collect()
        # Whatever was freed is put to other use.
        malloc, memset = ctypes.CDLL(None).malloc, ctypes.memset
        malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        for size in (16, 24, 40, 56):
            for _ in range(1000):
                memset(malloc(size), 0x41, size)
        collected.set()
        thread.join()
        recorder.close()
        print(recorder.path, set(results), flush=True)
        """
    ) as (child, _):
        assert child.wait() == 0
        assert child.stdout is not None
        path, results = child.stdout.read().split()
        assert results == "{0}"
        assert dodoco.open(path).snapshot().layers[0].passes == 100


@pytest.mark.parametrize("lanes", [0, -1, 17])
def test_impossible_numbers_of_lanes_are_refused(lanes: int) -> None:
    with pytest.raises(InputError, match=rf"lanes={lanes}: give 1 to 16"):
        Recorder([LayerSpec("a", 4, 2)], lanes=lanes)


@pytest.mark.parametrize("lane", [-1, LANES])
def test_a_lane_that_does_not_exist_is_refused(lane: int) -> None:
    probe = Laned.make()
    with pytest.raises(InputError, match=rf"lane {lane}: this recording has 3"):
        probe.recorder.use_lane(lane).__enter__()
    probe.recorder.close()


def test_a_thread_that_never_leaves_a_lane_is_told_so() -> None:
    probe = Laned.make()
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(probe.recorder.use_lane(1))
        with pytest.raises(InputError, match="at most 16 lanes"):
            probe.recorder.use_lane(2).__enter__()
        probe.record_ids(IDS)
    probe.record_ids(IDS)
    assert [probe.passes(lane)[0] for lane in range(LANES)] == [1, 1, 0]
    probe.recorder.close()


def test_settings_are_each_lanes_own_and_readers_know_the_lanes_names() -> None:
    probe = Laned.make()
    probe.recorder.lanes[1].microbatch = 5
    probe.recorder.lanes[2].enabled = False
    for lane in range(LANES):
        with probe.recorder.use_lane(lane):
            assert probe.recorder.get("microbatch", lane) == (5 if lane == 1 else 0)
            probe.record_ids(IDS)
    assert [probe.passes(lane)[0] for lane in range(LANES)] == [1, 1, 0]
    records = probe.reader.records()
    assert sorted(zip(records["lane"], records["microbatch"], strict=True)) == [(0, 0), (1, 5)]
    names = probe.reader.metadata["lanes"]
    assert len(names) == len(set(names)) == LANES
    probe.recorder.close()


# --- a model ------------------------------------------------------------------------------------

TOKENS = some_tokens((4, 30))


def assert_whole_passes(path: Path, model: ToyModel) -> list[int]:
    """Every layer holds some number of whole passes of TOKENS; returns these numbers."""
    reader = Reader(path)
    assert reader.header["num_faults"] == 0
    layers = reader.snapshot().layers
    for index, layer in enumerate(layers):
        each = reference.route_ids(model.ids(TOKENS)[index], layer.num_experts)
        np.testing.assert_array_equal(layer.counts, each.counts * layer.passes)
    return [layer.passes for layer in layers]


def test_threads_run_one_model_each_through_its_own_lane() -> None:
    model, rounds = ToyModel(num_layers=3), 40
    barrier = threading.Barrier(2)

    def work(attachment: dodoco.Attachment, lane: int) -> None:
        barrier.wait()
        with attachment.lane(lane), torch.no_grad():
            attachment.microbatch = 10 + lane
            for _ in range(rounds):
                model(TOKENS)

    with dodoco.attach(model, lanes=2) as a:
        threads = [threading.Thread(target=work, args=(a, lane)) for lane in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        records = a.reader.records()
        assert assert_whole_passes(a.path, model) == [2 * rounds] * 3
    for lane in range(2):
        mine = records[records["lane"] == lane]
        assert mine["iteration"].tolist() == [i for i in range(rounds) for _ in range(3)]
        assert mine["layer"].tolist() == [0, 1, 2] * rounds
        assert set(mine["microbatch"].tolist()) == {10 + lane}


def test_without_lanes_threads_share_one_and_lose_nothing() -> None:
    model, rounds = ToyModel(num_layers=3), 40

    def work() -> None:
        with torch.no_grad():
            for _ in range(rounds):
                model(TOKENS)

    with dodoco.attach(model) as a:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert assert_whole_passes(a.path, model) == [3 * rounds] * 3
        assert len(a.reader.records()) == 9 * rounds
        with pytest.raises(InputError, match="lane 1"):
            a.lane(1).__enter__()


@pytest.mark.parametrize("lanes", [1, 2])
def test_attaching_and_detaching_while_another_thread_runs_the_model(lanes: int) -> None:
    model = ToyModel(num_layers=3)
    with torch.no_grad():
        bare = model(TOKENS)
    stop, wrong, runs = threading.Event(), [], [0]

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(model(TOKENS), bare):
                    wrong.append(runs[0])
                runs[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(25):
            attachment = dodoco.attach(model, lanes=lanes)
            before = runs[0]
            while runs[0] < before + 3 and thread.is_alive():
                time.sleep(0.001)
            attachment.detach()
            # The model was inside when the probes came, one by one, and when they went.
            passes = assert_whole_passes(attachment.path, model)
            assert min(passes) >= 2
            assert len(attachment.reader.records()) == sum(passes)
            assert attachment.reader.state == "closed"
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert runs[0] >= 75
    assert not any("_dodoco_site" in vars(module) for module in model.modules())
