"""Faults planted in the observing kernel, each with a check that must see it.

Run by test_kernel_mutants.py in a process of its own; prints what became of each.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dodoco_ext.triton_kernels import counting, route_stats

import twin_checks

# Name: (check, what to replace, by what). Each text occurs once.
FAULTS = {
    "an id of E is an expert": ("few_passes", "(ids < E)", "(ids <= E)"),
    "a negative id is an expert": ("order", "(ids >= 0) &", "(ids >= -2) &"),
    "ids are narrowed first": (
        "few_passes",
        "        ids = next_ids\n",
        "        ids = next_ids.to(tl.int32)\n",
    ),
    "a row with padding is no token": (
        "few_passes",
        "tl.sum(padding, axis=1) < num_columns",
        "tl.sum(padding, axis=1) == 0",
    ),
    "padding is invalid": ("few_passes", "paddings += padding", "paddings += padding * 0"),
    "num_valid below 0 is 0": (
        "few_passes",
        "num_valid = tl.load(control + 3).to(tl.uint64)",
        "num_valid = tl.maximum(tl.load(control + 3), 0).to(tl.uint64)",
    ),
    "rows beyond num_valid are no padding": (
        "few_passes",
        "padded = beyond * num_columns + paddings",
        "padded = paddings",
    ),
    "a row that is not real is counted": (
        "few_passes",
        "has_row = row_in_tile < real_rows - first\n        inside",
        "has_row = row_in_tile < real_rows + 1 - first\n        inside",
    ),
    "a full row makes up for a short one": (
        "few_passes",
        "tl.maximum(top_k - routed, 0)",
        "(top_k - routed)",
    ),
    "a byte other than 1 is no choice": (
        "few_passes",
        "here = (values != 0)",
        "here = (values == 1)",
    ),
    "bits past the last expert are experts": (
        "few_passes",
        "return tl.where(expert < E, counts, 0), invalid",
        "return counts, invalid",
    ),
    "the same layer is the same iteration": (
        "few_passes",
        "(layer <= last_layer)",
        "(layer < last_layer)",
    ),
    "a pass that is off is no iteration": (
        "few_passes",
        "tl.store(state, iteration)",
        "tl.store(state, iteration, mask=switches.to(tl.int32) != 0)",
    ),
    "every program counts a recomputation": ("few_passes", "if program == 0:", "if program >= 0:"),
    "the scratch is not reset": (
        "few_passes",
        "tl.store(scratch + _SCRATCH_COUNTS + expert, 0, mask=expert < E)",
        "pass",
    ),
    "the first program finishes": (
        "few_passes",
        "last = ticket == tl.num_programs(0) - 1",
        "last = ticket == 0",
    ),
    "a bin's bound is not its own": (
        "bins",
        "gini = numerator * _BINS >=",
        "gini = numerator * _BINS >",
    ),
    "a ratio's bound is not its own": (
        "bins",
        "max_mean = largest.to(tl.int64) * (8 * E) >=",
        "max_mean = largest.to(tl.int64) * (8 * E) >",
    ),
    "there is one more size": ("bins", "(lane < _SIZE_CLASSES)", "(lane <= _SIZE_CLASSES)"),
    "counts are wider than the histogram": ("bins", "largest <= BINS:", "largest <= BINS + 1:"),
    "epochs start again at 0": (
        "laps",
        "tl.where(folded == 0x100000000, 1, folded)",
        "folded",
    ),
    "halves of a lap are not added": (
        "laps",
        "folded = (lap & 0xFFFFFFFF) + (lap >> 32)",
        "folded = lap & 0xFFFFFFFF",
    ),
    "the odd part is all of a divisor": (
        "sampling",
        "((count & every) == 0) & (count * inverse <= limit)",
        "(count * inverse <= limit)",
    ),
    "the microbatch is not recorded": (
        "marks",
        "((marks >> 32).to(tl.int32) << 16)",
        "((marks >> 32).to(tl.int32) << 17)",
    ),
    "a detached lane goes on": (
        "switched_off",
        "if magic == _CONTROL_MAGIC:",
        "if magic != 1:",
    ),
    "passes are not stored last": (
        "order",
        "mask=(word != 0) & (word != 9))",
        "mask=(word != 9))",
    ),
}  # fmt: skip
BARRIER = "tl.debug_barrier()"


Sources = dict[str, str]  # of the kernel's modules, by name


def mutants(sources: Sources) -> Iterator[tuple[str, str, Sources]]:
    """Name, check and sources of each."""
    for name, (check, old, new) in FAULTS.items():
        places = {module: text.count(old) for module, text in sources.items() if old in text}
        assert list(places.values()) == [1], f"{name}: {places}"
        (module,) = places
        yield name, check, {**sources, module: sources[module].replace(old, new)}
    parts = sources["route_stats"].split(BARRIER)
    for index in range(1, len(parts)):
        without = f"{BARRIER.join(parts[:index])}pass{BARRIER.join(parts[index:])}"
        yield f"barrier {index} is missing", "order", {**sources, "route_stats": without}


def load(package: str, sources: Sources, folder: Path) -> Any:
    """The kernel of these sources, as modules of a package of their own."""
    (folder / package).mkdir()
    for module, source in sources.items():
        source = source.replace("from dodoco_ext.triton_kernels.", f"from {package}.")
        (folder / package / f"{module}.py").write_text(source)
    return importlib.import_module(f"{package}.route_stats").observe


def main() -> None:
    modules = {"counting": counting, "route_stats": route_stats}
    sources = {name: Path(module.__file__).read_text() for name, module in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.append(folder)
        for index, (name, check, mutant) in enumerate(mutants(sources)):
            twin_checks.kernel = load(f"planted_{index}", mutant, Path(folder))
            try:
                twin_checks.run(check)
            except AssertionError:
                print("found:", name)
            else:
                print("MISSED:", name)


if __name__ == "__main__":
    main()
