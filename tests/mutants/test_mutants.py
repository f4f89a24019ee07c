"""The tests of the recording core can fail: each small error put into `csrc/` is found by them.

A mutant is built from the checkout's sources with one exact replacement, put into a copy of the
package, and held to the reference by `check.py`, which runs part of the covering arrays.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
import pytest

import dodoco_ext

TESTS = Path(__file__).resolve().parent.parent
CSRC = TESTS.parent / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILE = [
    *shlex.split(os.environ.get("CXX", "g++")),
    *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w"),
    f"-I{sysconfig.get_path('include')}",
    f"-I{pybind11.get_include()}",
]


@dataclass(frozen=True)
class Mutant:
    """One error: `old` becomes `new`, everywhere in one file; `rebuild` is what has to be compiled."""

    name: str
    file: str
    old: str
    new: str
    rebuild: str = "lane.cpp"


MUTANTS = [
    Mutant(
        "drops the first id of a pass",
        "route_stats.h",
        "for (std::int64_t slot = 0; slot < length; ++slot)",
        "for (std::int64_t slot = i == 0; slot < length; ++slot)",
    ),
    Mutant(
        "drops the last id of a dense pass",
        "route_stats.h",
        "length = dense ? rows * k : k",
        "length = dense ? rows * k - 1 : k",
    ),
    Mutant(
        "drops the last row of a strided pass",
        "route_stats.h",
        "i < lines; ++i",
        "i + !dense < lines; ++i",
    ),
    Mutant(
        "looks for padding in all rows but the last",
        "route_stats.h",
        "row < rows; ++row, ids += row_stride",
        "row + 1 < rows; ++row, ids += row_stride",
    ),
    Mutant(
        "counts padding as the last expert",
        "route_stats.h",
        "std::min<std::uint64_t>(id, num_experts)",
        "std::min<std::uint64_t>(id, num_experts - 1)",
    ),
    Mutant(
        "narrows ids before the range check",
        "route_stats.h",
        "std::int64_t{line[slot * slot_stride]}",
        "std::int64_t{(std::int32_t)line[slot * slot_stride]}",
    ),
    Mutant(
        "takes invalid ids for padding",
        "route_stats.h",
        "histogram[num_experts] - padded",
        "0",
    ),
    Mutant("ignores the slot stride", "route_stats.h", "line[slot * slot_stride]", "line[slot]"),
    Mutant("ignores the row stride", "route_stats.h", "line += row_stride", "line += k"),
    Mutant("counts padding rows as tokens", "route_stats.h", "padded_here < k", "true"),
    Mutant("looks at one bit of a byte", "route_stats.h", "tile[e] != 0", "tile[e] & 1"),
    Mutant("ignores the expert stride", "route_stats.h", "tile[e * expert_stride]", "tile[e]"),
    Mutant("forgets bits past E", "route_stats.h", "*invalid += beyond;", ";"),
    Mutant(
        "counts rows for dropped assignments",
        "route_stats.h",
        "missing += top_k - routed;",
        "missing += 1;",
    ),
    Mutant(
        "mistakes a full map row", "route_stats.h", "routed[row] < top_k", "routed[row] + 1 < top_k"
    ),
    Mutant(
        "stops Gini's prefix sum one early",
        "route_stats.h",
        "v < s.max_count; ++v",
        "v + 1 < s.max_count; ++v",
    ),
    Mutant(
        "is off by one in the sorted Gini",
        "route_stats.h",
        "std::int64_t{num_experts} + 1)",
        "std::int64_t{num_experts})",
    ),
    Mutant(
        "counts idle experts as used",
        "route_stats.h",
        "if (v == 0) s.unused",
        "if (v == 1) s.unused",
    ),
    Mutant(
        "overwrites the board's counts",
        "board.h",
        "add_to_own_word(expert_counts + e,",
        "store_word(expert_counts + e,",
    ),
    Mutant(
        "skips the assignments",
        "board.h",
        "add_to_own_word(block_ + kAssignments, totals.assignments);",
        "",
    ),
    Mutant("shifts the Gini bins", "board.h", "* kGiniBins / (", "* (kGiniBins - 1) / ("),
    Mutant("puts bounds into the bin below", "board.h", "eighths >=", "eighths >"),
    Mutant("takes the next size class", "board.h", "= 63 - static", "= 64 - static"),
    Mutant(
        "forgets to say that a pass began",
        "board.h",
        "add_to_own_word(block_ + kStartedPasses, 1);",
        "",
    ),
    Mutant(
        "lets an epoch be zero",
        "ring.h",
        "std::uint64_t{lap_epoch(head >> log2_slots_)} << 32",
        "((head >> log2_slots_) + 1) << 32",
    ),
    Mutant("leaves the head where it is", "ring.h", "store_word(&header_->head, head + 1);", ""),
    Mutant(
        "loses one slot", "ring.h", "i < kSlotWords; ++i) store", "i + 1 < kSlotWords; ++i) store"
    ),
    Mutant(
        "does not clear the histogram",
        "lane.cpp",
        "std::fill_n(histogram_.begin(), layer.num_experts + 2, 0);",
        "",
    ),
    Mutant(
        "does not clear padding and invalid",
        "lane.cpp",
        "std::fill_n(histogram_.begin(), layer.num_experts + 2, 0);",
        "std::fill_n(histogram_.begin(), layer.num_experts, 0);",
    ),
    Mutant(
        "ignores num_valid",
        "lane.cpp",
        "num_valid < 0 ? rows : std::min(rows, num_valid)",
        "rows",
    ),
    Mutant("starts no iteration at the same layer", "lane.cpp", "<= last_layer_", "< last_layer_"),
    Mutant(
        "does not count disabled iterations",
        "lane.cpp",
        "<= last_layer_) ++",
        "<= last_layer_ && control_.enabled) ++",
    ),
    Mutant(
        "gates the board",
        "lane.cpp",
        "layer.board.add_pass(",
        "if (recorded) layer.board.add_pass(",
    ),
    Mutant("counts recomputed passes", "lane.cpp", "if (recomputed) {", "if (false) {"),
    Mutant("accepts k > E", "lane.cpp", " || ids.k > layer.num_experts", ""),
    Mutant("accepts a copied site", "lane.cpp", "if (site->self !=", "if (false && site->self !="),
    Mutant("reads int16 unsigned", "lane.cpp", "const std::int16_t*", "const std::uint16_t*"),
    Mutant(
        "forgets what was lost",
        "ring_reader.cpp",
        "result.lost += partial.drop() + (head - ring.num_slots - result.next);",
        "partial.drop();",
        rebuild="ring_reader.cpp",
    ),
    Mutant(
        "skips the oldest record",
        "ring_reader.cpp",
        "head - ring.num_slots;",
        "head - ring.num_slots + 1;",
        rebuild="ring_reader.cpp",
    ),
    Mutant(
        "forgets the last rank's rows",
        "capture.h",
        "i < t.sent.size) sent",
        "i + 1 < t.sent.size) sent",
    ),
    Mutant(
        "counts rows of backward transfers",
        "capture.h",
        "if (forward && i < num_rows)",
        "if (i < num_rows)",
    ),
    Mutant(
        "takes durations that were not stamped",
        "capture.h",
        "if ((t.type & kFlagUntimed) != 0)",
        "if (false)",
    ),
    Mutant(
        "starts an iteration at each transfer", "capture.h", "<= last_layer) ++", "<= 65535) ++"
    ),
    Mutant(
        "ignores the transfer's own iteration", "capture.h", "if (t.iteration >= 0)", "if (false)"
    ),
    Mutant(
        "moves the head by one slot",
        "capture.h",
        "store(place.ring, head + num_slots);",
        "store(place.ring, head + 1);",
    ),
    Mutant(
        "leaves what was there before behind the counts", "capture.h", "slots.put(word, 0);", ";"
    ),
    Mutant(
        "puts counts a word too far",
        "capture.h",
        "+ 1 +\n         behind",
        "+ 2 +\n         behind",
    ),
    Mutant(
        "has an epoch for the whole record",
        "capture.h",
        "(slot >> log2_slots_) %",
        "(head_ >> log2_slots_) %",
    ),
    Mutant("reads wide counts narrow", "capture.h", "return is_wide != 0", "return is_wide > 1"),
    Mutant(
        "takes a continuation for a record's begin",
        "ring_reader.cpp",
        "if (partial.slots == 0) {",
        "if (false) {",
        rebuild="ring_reader.cpp",
    ),
    Mutant(
        "forgets that a placement was recorded",
        "placement.cpp",
        "publish_word(&header_->recorded, recorded + 1);",
        "publish_word(&header_->recorded, recorded);",
        rebuild="placement.cpp",
    ),
    Mutant(
        "has one epoch for all placements",
        "placement.cpp",
        "ring_epoch(head, shape_.kept)",
        "ring_epoch(0, shape_.kept)",
        rebuild="placement.cpp",
    ),
    Mutant(
        "writes a placement one word too far",
        "placement.cpp",
        "put(kPlacementCounts + 2 * num_experts + i, placement.slots[i]);",
        "put(kPlacementCounts + 2 * num_experts + i + 1, placement.slots[i]);",
        rebuild="placement.cpp",
    ),
    Mutant(
        "keeps the counts of the last lane with a placement",
        "recording_writer.cpp",
        "counts[e] += words[kBoardWords + e];",
        "counts[e] = words[kBoardWords + e];",
        rebuild="recording_writer.cpp",
    ),
    Mutant(
        "counts all faults as one",
        "recording_writer.cpp",
        "__atomic_fetch_add(&header->faults[index], 1",
        "__atomic_fetch_add(&header->faults[1], 1",
        rebuild="recording_writer.cpp",
    ),
    Mutant(
        "reads a placement in any lap",
        "placement_reader.cpp",
        "== SlotRead::kWhole;",
        "!= SlotRead::kNotYet;",
        rebuild="placement_reader.cpp",
    ),
]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unmutated sources, compiled: source name -> object."""
    folder = tmp_path_factory.mktemp("objects")
    built = {source.name: folder / f"{source.stem}.o" for source in CSRC.glob("*.cpp")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [
            pool.submit(run, [*COMPILE, "-c", str(CSRC / name), "-o", str(target)])
            for name, target in built.items()
        ]:
            done.result()
    return built


def check(objects: dict[str, Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Links a module into a copy of the package, and holds it to the reference."""
    package = folder / "dodoco_ext"
    shutil.copytree(
        Path(dodoco_ext.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels"),
    )
    target = str(package / f"_C{SUFFIX}")
    run([COMPILE[0], "-shared", "-pthread", *map(str, objects.values()), "-ldl", "-o", target])
    return subprocess.run(
        [sys.executable, str(TESTS / "mutants" / "check.py"), str(package)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)])},
    )


def test_the_unmutated_build_equals_the_reference(objects: dict[str, Path], tmp_path: Path) -> None:
    done = check(objects, tmp_path)
    assert (done.returncode, done.stdout) == (0, "all equal\n"), done.stderr[-4000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_found(mutant: Mutant, objects: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (source / mutant.file).read_text()
    assert mutant.old in text, f"csrc/{mutant.file} has changed: adapt this mutant"
    (source / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    rebuilt = tmp_path / "mutant.o"
    run([*COMPILE, "-c", str(source / mutant.rebuild), "-o", str(rebuilt)])
    done = check({**objects, mutant.rebuild: rebuilt}, tmp_path)
    assert done.returncode != 0, f"not found: a build that {mutant.name}"
    assert "AssertionError" in done.stderr, done.stderr[-4000:]
