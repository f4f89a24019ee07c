"""Transfers of the host: what is pushed is what is read, and totals are exact."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import transfer_cases
from dodoco_ext import _C
from dodoco_ext.capture import COMBINE, DISPATCH, Capture
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings
from transfer_cases import Sent, assert_records_are, assert_totals_are, open_recorder, push


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(directory=tmp_path / "recordings", max_bytes=1 << 19)


@pytest.mark.parametrize("ranks", [1, 2, 8, 9, 64, 255])
def test_what_is_pushed_is_read(settings: Settings, ranks: int) -> None:
    recorder = open_recorder(settings, ranks)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    transfers = transfer_cases.of_every_kind(ranks, 60, seed=ranks)
    for sent, iteration in zip(transfers, transfer_cases.iterations(transfers), strict=True):
        assert push(capture, sent) == iteration
    assert_records_are(reader, transfers)
    assert_totals_are(reader, transfers)
    assert reader.header["num_faults"] == 0
    recorder.close()


def test_the_ring_keeps_the_last_ones_and_the_totals_keep_all(settings: Settings) -> None:
    recorder = open_recorder(settings, 7)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    transfers = transfer_cases.of_every_kind(7, 4000)
    for sent in transfers:
        push(capture, sent)
    assert 0 < len(reader.transfers()) < len(transfers)
    assert_records_are(reader, transfers)
    assert_totals_are(reader, transfers)
    recorder.close()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 12))
def test_reading_on_misses_nothing_and_repeats_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], ranks: int
) -> None:
    settings = Settings(directory=tmp_path_factory.mktemp("r") / "r", max_bytes=60 << 10)
    recorder = open_recorder(settings, ranks)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    transfers = transfer_cases.of_every_kind(ranks, sum(steps))
    cursor, done, slots, lost = None, 0, 0, 0
    seen: list[int] = []
    for step in steps:
        for sent in transfers[done : done + step]:
            push(capture, sent)
        done += step
        found = reader.transfers(cursor)
        cursor = found.next_cursor
        seen += np.sort(found.records["sequence"]).tolist()
        counts = 2 * ranks + found.records["num_experts"].astype(int)
        slots += int(np.sum(np.where(counts <= 3, 1, 1 + -(-(counts - 3) // 15))))
        lost += found.lost
    assert seen == sorted(set(seen))
    assert seen[-1] == done - 1
    assert slots + lost == cursor[0], "accepted + lost = written"
    recorder.close()


def test_passes_and_transfers_share_a_ring_and_an_iteration(settings: Settings) -> None:
    recorder = Recorder(
        [LayerSpec("a", 4, 1), LayerSpec("b", 4, 1)],
        group=GroupSpec((0, 1), 0),
        settings=settings,
    )
    sites = np.zeros((2, 8), np.uint64)
    ids = np.array([[0], [3]], np.int64)
    for layer in range(2):
        recorder.bind(layer, sites[layer], sites[layer].ctypes.data)
    capture, reader = Capture(recorder, advances=False), Reader(recorder.path)
    for iteration in range(3):
        for layer in range(2):
            site = sites[layer].ctypes.data
            assert _C.route_ids(site, ids.ctypes.data, 8, 2, 1, 1, 1, False) == 0
            for op in (DISPATCH, COMBINE):
                begun = capture.begin(layer, op)
                assert capture.end(begun, [1, 1], [2, 0], bytes_per_row=8) == iteration
    routes, _, lost = reader.read()
    assert routes["iteration"].tolist() == [0, 0, 1, 1, 2, 2]
    found = reader.transfers()
    assert found.records["iteration"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (lost, found.lost) == (0, 0)
    assert [layer.passes for layer in reader.snapshot().layers] == [3, 3]
    recorder.close()


def test_a_ring_gets_every_nth_iteration_and_the_totals_all(settings: Settings) -> None:
    recorder = open_recorder(settings, 2)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    recorder.set("record_every", 3)
    for _ in range(7):
        capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 5)
    assert reader.transfers().records["iteration"].tolist() == [0, 3, 6]
    assert reader.traffic()[0].executions == 7
    recorder.close()


def test_what_is_paused_is_not_traffic_but_takes_its_iteration(settings: Settings) -> None:
    recorder = open_recorder(settings, 2)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 5)
    recorder.set("enabled", 0)
    assert capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 5) == -1
    recorder.set("enabled", 1)
    assert capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 5) == 2
    assert reader.transfers().records["iteration"].tolist() == [0, 2]
    assert reader.traffic()[0].executions == 2
    recorder.close()


def test_arrays_and_tensors_are_lists_of_integers(settings: Settings) -> None:
    torch = pytest.importorskip("torch")
    recorder = open_recorder(settings, 3)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    for counts in (
        [4, 5, 6],
        (4, 5, 6),
        np.array([4, 5, 6], np.int32),
        np.array([4, 0, 5, 0, 6, 0], np.uint64)[::2],
        torch.tensor([4, 5, 6]),
        torch.tensor([[4, 9], [5, 9], [6, 9]], dtype=torch.int32)[:, 0],
    ):
        transfer = capture.begin(0, DISPATCH)
        assert capture.end(transfer, counts, counts, experts=counts) >= 0
    found = reader.transfers()
    for rows in (found.sent, found.received, found.experts):
        assert rows.tolist() == [[4, 5, 6]] * 6
    assert (found.records["begin_ns"] <= found.records["end_ns"]).all()
    recorder.close()


@pytest.mark.parametrize(
    ("send", "experts", "said"),
    [
        ([1, 2], None, "not recorded"),
        ([1, -2, 3], None, "-2 rows"),
        ([1, 1 << 32, 3], None, "4294967296 rows"),
        (["1", 2, 3], None, "integer"),
        (np.zeros((3, 1)), None, "integers"),
        (np.zeros(3, np.int16), None, "4- or 8-byte"),
        (3, None, "not int"),
        ([1, 2, 3], [0] * 70000, "at most 65535"),
        ([1, 2, 3], [0] * 5000, "not recorded"),
    ],
)
def test_what_cannot_be_recorded_is_a_fault_and_no_error(
    settings: Settings, caplog: pytest.LogCaptureFixture, send: object, experts: object, said: str
) -> None:
    recorder = open_recorder(settings, 3)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    with caplog.at_level(logging.ERROR, "dodoco"):
        for _ in range(2):
            transfer = capture.begin(0, DISPATCH)
            assert capture.end(transfer, send, [1, 2, 3], experts=experts) == -1  # type: ignore[arg-type]
    assert reader.header["num_faults"] == 2
    (message,) = caplog.messages
    assert said in message
    assert len(reader.transfers()) == reader.traffic()[0].executions == 0
    recorder.close()


def test_a_layer_that_is_not_there_is_a_fault(settings: Settings) -> None:
    recorder = open_recorder(settings, 2, layers=2)
    assert Capture(recorder, advances=True).push(2, DISPATCH, [1, 1], [1, 1], 0, 1) == -1
    assert Reader(recorder.path).header["last_fault"] == _C.Fault.INTERNAL.value
    recorder.close()


def test_nothing_is_written_after_the_end(settings: Settings) -> None:
    recorder = open_recorder(settings, 2)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    recorder.close()
    assert capture.push(0, DISPATCH, [1, 1], [1, 1], 0, 1) == -1
    assert len(reader.transfers()) == 0


def test_threads_with_lanes_of_their_own_are_added_up(settings: Settings) -> None:
    recorder = open_recorder(settings, 2, lanes=2)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 1)
    with recorder.use_lane(1):
        capture.push(0, DISPATCH, [10, 20], [30, 40], 0, 2)
    found = reader.transfers()
    assert found.records["lane"].tolist() == [0, 1]
    assert found.records["iteration"].tolist() == [0, 0]
    assert reader.traffic()[0].sent.tolist() == [11, 22]
    recorder.close()


def test_totals_are_subtracted(settings: Settings) -> None:
    recorder = open_recorder(settings, 2)
    capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
    capture.push(0, DISPATCH, [1, 2], [3, 4], 0, 5, bytes_per_row=2)
    before = reader.traffic()[0]
    capture.push(0, DISPATCH, [5, 6], [7, 8], 10, 17, bytes_per_row=2, timed=True)
    window = reader.traffic()[0] - before
    assert (window.sent.tolist(), window.executions, window.duration_ns) == ([5, 6], 1, 7)
    assert (window.sent_bytes, window.received_bytes) == (22, 30)
    with pytest.raises(InputError, match="swap them"):
        before - reader.traffic()[0]
    with pytest.raises(InputError, match="type 3"):
        reader.traffic()[1] - before
    recorder.close()


def test_a_recording_names_its_group(settings: Settings) -> None:
    recorder = open_recorder(settings, 3)
    reader = Reader(recorder.path)
    assert reader.group is not None
    assert (reader.group.ranks, reader.group.index, reader.group.name) == ((10, 11, 12), 2, "ep")
    assert [layer["routed"] for layer in reader.metadata["layers"]] == [False, False]
    recorder.close()


def test_without_a_group_there_are_no_transfers(settings: Settings) -> None:
    recorder = Recorder([LayerSpec("a", 4, 1)], settings=settings)
    reader = Reader(recorder.path)
    assert (reader.group, reader.traffic(), len(reader.transfers())) == (None, (), 0)
    assert "routed" not in reader.metadata["layers"][0]
    with pytest.raises(InputError, match="names no group"):
        Capture(recorder, advances=True)
    recorder.close()


@pytest.mark.parametrize(
    ("ranks", "index", "said"),
    [
        ((), 0, "0 ranks"),
        ((1, 1), 0, "different"),
        ((0, -1), 0, "different"),
        (tuple(range(1025)), 0, "1 to 1024"),
        ((0, 1), 2, "index 2"),
        ((0, 1), -1, "index -1"),
    ],
)
def test_an_impossible_group_is_refused(
    settings: Settings, ranks: tuple[int, ...], index: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Recorder([LayerSpec("a", 4, 1)], group=GroupSpec(ranks, index), settings=settings)


def test_the_largest_group_fits(settings: Settings) -> None:
    recorder = open_recorder(Settings(directory=settings.directory, max_bytes=8 << 20), 1024)
    sent = Sent(1, COMBINE, tuple(range(1024)), tuple(range(1024, 2048)))
    assert push(Capture(recorder, advances=True), sent) == 0
    assert_records_are(Reader(recorder.path), [sent])
    recorder.close()


def test_a_file_too_small_for_its_group_is_refused_with_the_fix(settings: Settings) -> None:
    with pytest.raises(RecordingError, match="DODOCO_MAX_BYTES"):
        open_recorder(Settings(directory=settings.directory, max_bytes=200 << 10), 1024)


@pytest.mark.parametrize(
    "damage",
    [
        {"ranks": 0}, {"ranks": 4}, {"ranks": 1 << 40}, {"index": 3}, {"count": 3},
        {"stride": 12}, {"stride": 64}, {"stride": 1 << 62}, {"bytes": 63}, {"kind": 9}, {"lane": 5},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_traffic_is_damage(settings: Settings, damage: dict[str, int]) -> None:
    recorder = open_recorder(settings, 3, lanes=2)
    recorder.close()
    image = bytearray(recorder.path.read_bytes())
    fields = {"kind": "I", "lane": "I", "offset": "Q", "bytes": "Q", "count": "Q", "stride": "Q"}
    for entry in range(248, 248 + 40 * 64, 40):
        section = dict(zip(fields, struct.unpack_from("<IIQQQQ", image, entry), strict=True))
        if (section["kind"], section["lane"]) == (8, 1):
            break
    ranks, index = struct.unpack_from("<QQ", image, section["offset"])
    header = {"ranks": ranks, "index": index, **damage}
    struct.pack_into("<QQ", image, section["offset"], header["ranks"], header["index"])
    changed = {name: damage.get(name, section[name]) for name in fields}
    struct.pack_into("<IIQQQQ", image, entry, *changed.values())
    recorder.path.write_bytes(image)
    with pytest.raises(RecordingError, match="is damaged"):
        Reader(recorder.path)


def test_a_group_that_the_metadata_does_not_name_is_damage(settings: Settings) -> None:
    recorder = open_recorder(settings, 3)
    recorder.close()
    image = recorder.path.read_bytes()
    for old, new in ((b"[10, 11, 12]", b"[10,    11 ]"), (b'"group"', b'"gruop"')):
        recorder.path.write_bytes(image.replace(old, new))
        with pytest.raises(RecordingError, match="is damaged: unreadable metadata"):
            Reader(recorder.path)
