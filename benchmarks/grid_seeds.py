"""Whether another seed of the grid gives the same figures, within their intervals.

    dodoco observe --preset grid --seed 1 --out results/grid-1
    .venv/bin/python benchmarks/grid_seeds.py results/grid/grid.json results/grid-1/grid.json

Both seeds are samples, so a figure of the second lies in the 95 % interval of the first with a probability of
P(|Z| < 1.96 / sqrt(2)), 83 %. Fails below 75 %, or where two intervals of one figure do not overlap.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEAST = 0.75
Figure = tuple[float, tuple[float, float]]


def figures_of(numbers: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every figure that has an interval, with its kind, in one order."""
    for cell in numbers["cells"]:
        for over in ("experts", "ranks"):
            for name in ("gini", "corrected_gini", "max_over_mean"):
                yield "figures", (cell[over][name], cell[over][f"{name}_interval"])
    for ratio in numbers["ratios"]:
        for name in ("gini", "corrected"):
            yield "ratios", (ratio[name], ratio[f"{name}_interval"])
    for scan in numbers["batch_scans"]:
        for curve in ("growing", "equal"):
            for name in ("raw_slope", "corrected_slope"):
                slope = scan[curve][name]
                yield "slopes", (slope["value"], slope["interval"])


def main() -> int:
    first, second = (json.loads(Path(name).read_text())["numbers"] for name in sys.argv[1:3])
    seen, inside, overlapping = Counter(), Counter(), Counter()
    for (kind, (_, (low, high))), (_, (value, (least, most))) in zip(
        figures_of(first), figures_of(second), strict=True
    ):
        seen[kind] += 1
        inside[kind] += low <= value <= high
        overlapping[kind] += least <= high and low <= most
    for kind, number in seen.items():
        print(f"{kind}: {inside[kind]} of {number} inside, {overlapping[kind]} of {number} overlap")
    seeds = [numbers["parameters"]["seed"] for numbers in (first, second)]
    verdicts = [
        [scan["growing"]["corrected_slope"]["verdict"] for scan in numbers["batch_scans"]]
        for numbers in (first, second)
    ]
    equal = sum(a == b for a, b in zip(*verdicts, strict=True))
    print(f"seeds {seeds}: {equal} of {len(verdicts[0])} verdicts on the trend are equal")
    enough = all(inside[kind] >= LEAST * number for kind, number in seen.items())
    return 0 if enough and overlapping["figures"] == seen["figures"] else 1


if __name__ == "__main__":
    sys.exit(main())
