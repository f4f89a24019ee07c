"""Snapshots as files: exact, whole, and never a crash, whatever the file holds."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planted
from dodoco_ext import snapshots
from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.errors import InputError
from dodoco_ext.recording import Reader
from dodoco_ext.snapshots import difference, load_snapshot, save_snapshot

BIG = (1 << 64) - 1
COUNTERS = [f.name for f in dataclasses.fields(LayerSnapshot) if f.type == "int"]
ARRAYS = ("counts", "gini_histogram", "max_over_mean_histogram")


@pytest.fixture
def taken() -> Snapshot:
    path = planted.recording([*planted.layers(2), planted.LayerSpec("last", 5, 0)], [3, 70])
    return Reader(path).snapshot()


def assert_equal(found: Snapshot, expected: Snapshot) -> None:
    assert (found.recording, found.time_ns, found.start_ns) == (
        expected.recording,
        expected.time_ns,
        expected.start_ns,
    )
    for a, b in zip(found.layers, expected.layers, strict=True):
        for field in dataclasses.fields(LayerSnapshot):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name in ARRAYS:
                assert x.dtype == np.uint64
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y
                assert type(x) is type(y)


def test_a_saved_snapshot_is_the_same_snapshot(taken: Snapshot, tmp_path: Path) -> None:
    save_snapshot(taken, tmp_path / "a.json")
    assert_equal(load_snapshot(tmp_path / "a.json"), taken)
    assert load_snapshot(str(tmp_path / "a.json")).layers[0].gini == taken.layers[0].gini


def test_integers_are_exact_to_64_bits(taken: Snapshot, tmp_path: Path) -> None:
    counts = np.array([BIG - 3, 1, 2, 0, 0], np.uint64)
    layer = dataclasses.replace(
        taken.layers[2], index=0, counts=counts, assignments=BIG, tokens=BIG
    )
    big = dataclasses.replace(taken, layers=(layer,), time_ns=BIG)
    save_snapshot(big, tmp_path / "big.json")
    assert_equal(load_snapshot(tmp_path / "big.json"), big)
    assert str(BIG) in (tmp_path / "big.json").read_text()


def test_a_difference_can_be_saved_too(tmp_path: Path) -> None:
    made = planted.Planted(planted.layers(1))
    reader = Reader(made.path)
    before = reader.snapshot()
    made.route_all([4])
    window = reader.snapshot() - before
    save_snapshot(window, tmp_path / "window.json")
    assert_equal(load_snapshot(tmp_path / "window.json"), window)
    made.close()


def test_the_file_is_private_and_replaced_in_one_step(taken: Snapshot, tmp_path: Path) -> None:
    target = tmp_path / "saved" / "a.json"
    target.parent.mkdir()
    save_snapshot(taken, target)
    assert target.stat().st_mode & 0o777 == 0o600
    stop, problems, loads = threading.Event(), [], 0

    def read() -> None:
        nonlocal loads
        while not stop.is_set():
            try:
                load_snapshot(target)
                loads += 1
            except InputError as error:
                problems.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(50):
        save_snapshot(taken, target)
    stop.set()
    thread.join()
    assert problems == []
    assert loads > 0
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_what_was_there(
    taken: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "saved" / "a.json"
    target.parent.mkdir()
    save_snapshot(taken, target)
    before = target.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=rf"cannot write {target}: No space left on device"):
        save_snapshot(taken, target)
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_written_is_one_line(taken: Snapshot, tmp_path: Path) -> None:
    target = tmp_path / "none" / "a.json"
    with pytest.raises(InputError, match=f"cannot write {target}: No such file or directory"):
        save_snapshot(taken, target)


def test_nothing_but_a_snapshot_is_replaced(taken: Snapshot, tmp_path: Path) -> None:
    recording = planted.recording(planted.layers(1))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in (recording, tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match=f"{target} is there, and no saved snapshot"):
            save_snapshot(taken, target)
    assert len(Reader(recording).records()) == 3


# --- Hostile files -------------------------------------------------------------------------------


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda d: d.update(schema="dodoco.snapshot/2"), "schema is 'dodoco.snapshot/2'"),
    "no schema": (lambda d: d.pop("schema"), "schema is None"),
    "uuid": (lambda d: d.update(recording="../../etc/passwd"), "32 hexadecimal digits"),
    "uuid type": (lambda d: d.update(recording=["a"]), "recording is a list"),
    "time": (lambda d: d.update(time_ns=-1), "time_ns of the file is -1"),
    "huge time": (lambda d: d.update(start_ns=10**400), "a number of many digits"),
    "no layers": (lambda d: d.update(layers=[]), "layers is not a list of layers"),
    "layers": (lambda d: d.update(layers={"0": 1}), "layers is not a list of layers"),
    "layer": (lambda d: d["layers"].append("gate"), "layer 3 is 'gate', not an object"),
    "order": (lambda d: d["layers"].reverse(), "layer 0 has index 2"),
    "name": (lambda d: d["layers"][0].update(name=None), "name of layer 0 is None"),
    "flag": (lambda d: d["layers"][0].update(in_flight=1), "in_flight of layer 0 is 1"),
    "experts": (lambda d: d["layers"][0].update(num_experts=10**9), "top 2 of 1000000000 experts"),
    "no experts": (lambda d: d["layers"][0].update(num_experts=0), "top 2 of 0 experts"),
    "top_k": (lambda d: d["layers"][0].update(top_k=9), "top 9 of 8 experts"),
    "float": (lambda d: d["layers"][0].update(passes=2.0), "passes of layer 0 is 2.0"),
    "bool": (lambda d: d["layers"][0].update(passes=True), "passes of layer 0 is True"),
    "large": (lambda d: d["layers"][0].update(tokens=BIG + 1), "not a count from 0 to 2"),
    "missing": (lambda d: d["layers"][0].pop("padded"), "padded of layer 0 is None"),
    "counts": (lambda d: d["layers"][0]["counts"].pop(), "counts of layer 0 is not a list of 8"),
    "count": (lambda d: d["layers"][0]["counts"].__setitem__(1, "7"), "holds '7', not a count"),
    "negative": (lambda d: d["layers"][0]["counts"].__setitem__(1, -7), "holds -7, not a count"),
    "sum": (lambda d: d["layers"][1].update(assignments=7), "do not add up to its assignments"),
    "rows": (lambda d: d["layers"][0].update(gini_histogram=[]), "gini_histogram of layer 0"),
    "row": (
        lambda d: d["layers"][0]["max_over_mean_histogram"][3].pop(),
        "max_over_mean_histogram of layer 0 is not a list of 32",
    ),
    "long": (lambda d: d.update(schema="x" * 10_000), r"schema is 'x+\.\.\."),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_field_is_named(name: str, taken: Snapshot, tmp_path: Path) -> None:
    edit, complaint = EDITS[name]
    path = tmp_path / "a.json"
    save_snapshot(taken, path)
    edited(path, edit)
    with pytest.raises(InputError, match=complaint) as caught:
        load_snapshot(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a saved snapshot: ")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0" * 100, b"\xff\xfe", b"3", b"null", b"[]", b"{}", b"{", b'{"schema": '),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b'{"schema": Infinity}', b"1" * 10_000),
        b'{"schema": "\\ud800"}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_any_content_is_an_error_of_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a saved snapshot: ") as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)


def test_random_damage_is_refused_or_read(taken: Snapshot, tmp_path: Path) -> None:
    """1000 random changes of bytes: a valid snapshot or an InputError, never anything else."""
    path = tmp_path / "a.json"
    save_snapshot(dataclasses.replace(taken, layers=taken.layers[:1]), path)
    sound = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 1, 9))] = rng.choice(
                (
                    b"",
                    b"-",
                    b"9",
                    b'"',
                    b"}",
                    b"]",
                    b",",
                    b"null",
                    b"1e9",
                    bytes([rng.randrange(256)]),
                )
            )
        path.write_bytes(data)
        try:
            load_snapshot(path).to_rows()
        except InputError:
            refused += 1
    assert 500 < refused < 1000


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, complaint in (
        (tmp_path / "fifo", "is not a file"),
        (tmp_path, "is not a file|Is a directory"),
        (tmp_path / "none", "^cannot read the snapshot .*: No such file"),
        (Path("/dev/zero"), "is not a file"),
        ("with\0nul", "cannot read the snapshot"),
    ):
        with pytest.raises(InputError, match=complaint):
            load_snapshot(path)


def test_a_file_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 1 << 40)  # sparse: a terabyte
    with pytest.raises(InputError, match=f"longer than {snapshots.MAX_BYTES} bytes"):
        load_snapshot(path)


def test_what_could_not_be_read_again_is_not_saved(
    taken: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="more than 100"):
        save_snapshot(taken, tmp_path / "a.json")
    assert list(tmp_path.glob("*.json")) == []


# --- Differences ---------------------------------------------------------------------------------


def test_a_difference_with_a_file_is_checked(tmp_path: Path) -> None:
    made = planted.Planted(planted.layers(2))
    reader = Reader(made.path)
    made.route_all([4])
    save_snapshot(reader.snapshot(), tmp_path / "a.json")
    made.route_all([3])
    now, earlier = reader.snapshot(), load_snapshot(tmp_path / "a.json")
    assert [layer.tokens for layer in difference(now, earlier).layers] == [3, 3]
    with pytest.raises(InputError, match="later than the recording"):
        difference(earlier, now)
    wrong = {
        "of recording ffffffff, not of": dataclasses.replace(earlier, recording="f" * 32),
        "has other layers": dataclasses.replace(earlier, layers=earlier.layers[:1]),
        r"later than the recording \(the time\)": dataclasses.replace(earlier, time_ns=BIG),
    }
    # One count more and one less: the sums would not tell.
    shifted = earlier.layers[0].counts.copy()
    shifted[int(now.layers[0].counts.argmin())] += 100
    layers = (dataclasses.replace(earlier.layers[0], counts=shifted), earlier.layers[1])
    wrong[r"later than the recording \(counts of layer"] = dataclasses.replace(
        earlier, layers=layers
    )
    for complaint, snapshot in wrong.items():
        with pytest.raises(InputError, match=complaint):
            difference(now, snapshot, "a.json")
    made.close()
