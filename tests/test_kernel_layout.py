"""The kernel and its twins know the bytes of csrc/format.h."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from dodoco_ext.triton_kernels import route_stats

import twins
from dodoco_ext import device
from dodoco_ext.counters import MAX_OVER_MEAN_BOUNDS

FORMAT = (Path(__file__).parents[1] / "csrc" / "format.h").read_text()
BYTES = {"uint64_t": 8, "int64_t": 8, "uint32_t": 4}


def constant(name: str) -> int:
    found = re.search(rf"\b{name}\s*=\s*(0x[0-9A-F]+|\d+)[;,]", FORMAT)
    assert found is not None, name
    return int(found.group(1), 0)


def offsets(struct: str) -> dict[str, int]:
    """Byte offset of each field; fields are as large as they are aligned."""
    found = re.search(rf"^struct {struct} {{(.*?)^}};", FORMAT, re.MULTILINE | re.DOTALL)
    assert found is not None, struct
    at, fields = 0, {}
    for kind, name, count in re.findall(r"std::(\w+) (\w+)(?:\[(\d+)\])?;", found.group(1)):
        assert at % BYTES[kind] == 0, name
        fields[name] = at
        at += BYTES[kind] * int(count or 1)
    return fields


def test_words_of_a_lane_are_where_the_kernel_and_the_twins_look() -> None:
    control, state = offsets("ControlBlock"), offsets("LaneState")
    words = {
        "magic": twins.MAGIC, "enabled": twins.SWITCHES, "num_valid": twins.NUM_VALID,
        "map_version": twins.MARKS, "ring": twins.RING, "log2_slots": twins.LOG2_SLOTS,
        "clock_offset_ns": twins.CLOCK_OFFSET, "scratch": twins.SCRATCH,
        "every_mask": twins.EVERY.start, "every_limit": twins.EVERY.stop - 1,
    }  # fmt: skip
    assert {name: word * 8 for name, word in words.items()} == {
        name: control[name] for name in words
    }
    assert control["record_every"] == twins.SWITCHES * 8 + 4
    assert control["microbatch"] == twins.MARKS * 8 + 4
    # The state follows the control block, and the bounds follow the state.
    at = route_stats._STATE.value * 8
    assert [at + state[name] for name in ("iteration", "last_layer", "head")] == [
        word * 8 for word in (twins.ITERATION, twins.LAST_LAYER, twins.HEAD)
    ]
    assert f"offsetof(DeviceLane, state) == {at}" in FORMAT
    bounds = route_stats._BOUNDS.value * 8
    assert twins.BOUNDS.start * 8 == bounds
    assert f"offsetof(DeviceLane, max_mean_eighths) == {bounds}" in FORMAT


@pytest.mark.parametrize(
    ("name", "restated"),
    [
        ("kControlMagic", route_stats._CONTROL_MAGIC),
        ("kBoardWords", route_stats._BOARD_WORDS),
        ("kRecomputed", route_stats._RECOMPUTED),
        ("kSizeClasses", route_stats._SIZE_CLASSES),
        ("kGiniBins", route_stats._BINS),
        ("kMaxMeanBins", route_stats._BINS),
        ("kSlotWords", route_stats._SLOT_WORDS),
        ("kScratchCounts", route_stats._SCRATCH_COUNTS),
    ],
)
def test_constants_are_those_of_the_format(name: str, restated: object) -> None:
    assert constant(name) == restated.value  # type: ignore[attr-defined]


def test_bounds_of_the_twins_are_those_of_the_format() -> None:
    assert [bound / 8 for bound in twins.MAX_MEAN_EIGHTHS] == list(MAX_OVER_MEAN_BOUNDS)


def test_what_is_said_without_triton_is_what_the_kernel_knows() -> None:
    assert device.MAX_EXPERTS == route_stats.MAX_EXPERTS
    known = {"ids": route_stats.IDS, "map": route_stats.MAP, "bits": route_stats.BITS}
    assert known == device.FORMS
