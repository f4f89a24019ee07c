"""Trends over batch sizes that are none: how often routers of independent tokens are said to have one.

    python benchmarks/batch_trend.py

Every cell is drawn from a router of known loads whose tokens are independent of each other, so its
raw Gini falls with the batch and nothing else does. Prints, a router, the mean and the standard
deviation of the slope that correction and twins leave, and the share of verdicts other than `none`
(with and without `batch_slopes.SMALLEST`).
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from dodoco_ext.observatory.grid.batch_scan import batch_scan
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.sampling import sample_counts

DRAWS, SEQUENCES, LAYERS, EXPERTS, TOP_K, TOKENS = 4, 128, 4, 64, 4, 128


def routers() -> dict[str, np.ndarray | None]:
    zipf = -0.7 * np.log(np.arange(1, EXPERTS + 1))
    return {
        "uniform": None,
        "linear": np.linspace(0, 1.2, EXPERTS),
        "bell": np.random.default_rng(1).normal(0, 1, EXPERTS),
        "zipf": zipf,
        "hot": np.where(np.arange(EXPERTS) < EXPERTS // 8, 1.5, 0.0),
        "cold": np.where(np.arange(EXPERTS) < EXPERTS // 4, -2.0, 0.0),
    }


def drawn(log_weights: np.ndarray | None, seed: int) -> Cell:
    shape = (DRAWS, SEQUENCES, LAYERS, EXPERTS)
    number = DRAWS * SEQUENCES * LAYERS
    rng = np.random.default_rng(seed)
    counts = sample_counts(rng, TOKENS, EXPERTS, TOP_K, number, log_weights).reshape(shape)
    return Cell(
        model="planted",
        name=str(seed),
        kind="real",
        source="planted",
        description="planted",
        counts=counts.astype(np.int32),
        losses=np.zeros(shape[:2]),
        top_k=[TOP_K] * LAYERS,
        layer_names=[f"layer {n}" for n in range(LAYERS)],
        key={},
        facts={},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=20, help="cells a router")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for name, weights in routers().items():
        scans = [batch_scan(drawn(weights, seed), seed) for seed in range(options.cells)]
        arms = {}
        for arm in ("growing", "equal"):
            slopes = [getattr(scan, arm).corrected_slope for scan in scans]
            values = [slope.value for slope in slopes]
            arms[arm] = {
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)),
                "interval excludes 0": float(
                    np.mean([not s.interval[0] <= 0 <= s.interval[1] for s in slopes])
                ),
                "called a trend": float(np.mean([s.verdict != "none" for s in slopes])),
            }
        found[name] = arms
        if not options.json:
            for arm, figures in arms.items():
                print(name, arm, {key: round(value, 5) for key, value in figures.items()})
    if options.json:
        print(json.dumps({"cells": options.cells, "routers": found}, indent=1))


if __name__ == "__main__":
    main()
