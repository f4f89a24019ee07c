"""How often 95 % intervals of the observatory cover a Gini that is known, and which trends uniform routing shows.

Routers of known Gini choose experts token by token; the choices go through recordings, and what comes out
are the figures and intervals of `dodoco observe` and of its grid. Prints two tables; `--json FILE` keeps them with
machine and versions. Minutes on one core; a small version is in tests/test_planted_truth.py.

    python benchmarks/planted_truth.py --runs 200 --json benchmarks/results/planted-truth.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from environment import describe

from planted_routers import LAYERS, observe, router

SCENARIOS = {
    "independent tokens, Gini 0.10": (0.10, 0.0),
    "independent tokens, Gini 0.20": (0.20, 0.0),
    "independent tokens, Gini 0.30": (0.30, 0.0),
    "independent tokens, Gini 0.50": (0.50, 0.0),
    "texts that differ, Gini 0.20 and more": (0.20, 0.6),
}
"""Gini of the router, and how much each sequence moves its log weights."""


def coverage(name: str, runs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Interval by interval: how many of `runs` covered the truth."""
    target, jitter = SCENARIOS[name]
    root = np.random.default_rng([seed, [*SCENARIOS].index(name)])
    covered: dict[str, int] = {}
    errors: dict[str, list[float]] = {}
    for _ in range(runs):
        # New routers each time, so that no single one decides.
        routers = [router(target, root, jitter) for _ in range(LAYERS)]
        truths = np.array([one.truth(root) for one in routers]).mean(axis=0)
        found = observe(routers, root)
        assert found.cell.ranks is not None
        overall = found.summary.overall
        figures = {
            "grid, experts": (found.cell.experts, truths[0]),
            "grid, ranks": (found.cell.ranks, truths[1]),
            "observe, experts": (overall, truths[0]),
        }
        for scope, (figure, truth) in figures.items():
            low, high = figure.corrected_gini_interval
            covered[scope] = covered.get(scope, 0) + (low <= truth <= high)
            errors.setdefault(scope, []).append(figure.corrected_gini - truth)
    for scope, hits in covered.items():
        low, high = wilson(hits, runs)
        yield {
            "routing": name,
            "interval": scope,
            "runs": runs,
            "covered": hits / runs,
            "covered_interval": [low, high],
            "bias": float(np.mean(errors[scope])),
            "error": float(np.std(errors[scope])),
        }


def trends(runs: int, seed: int) -> dict[str, Any]:
    """Of uniformly routed cells, how many have a trend over batch sizes, in raw and in corrected Gini."""
    rng = np.random.default_rng([seed, 99])
    raw, corrected, at_equal, slopes = 0, 0, 0, []
    for _ in range(runs):
        routers = [router(0.0, rng) for _ in range(LAYERS)]
        scan = observe(routers, rng, draws=4, sequences=128).batch_scan()  # the grid's default
        raw += scan.growing.raw_slope.verdict != "none"
        corrected += scan.growing.corrected_slope.verdict != "none"
        at_equal += scan.equal.corrected_slope.verdict != "none"
        slopes.append((scan.growing.raw_slope.value, scan.growing.corrected_slope.value))
    return {
        "runs": runs,
        "raw_trend": raw / runs,
        "corrected_trend": corrected / runs,
        "corrected_trend_interval": [*wilson(corrected, runs)],
        "corrected_trend_at_equal_tokens": at_equal / runs,
        "mean_raw_slope": float(np.mean([a for a, _ in slopes])),
        "mean_corrected_slope": float(np.mean([b for _, b in slopes])),
    }


def wilson(hits: int, runs: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, JASA 22, 1927)."""
    middle = (hits + z**2 / 2) / (runs + z**2)
    half = z * sqrt(hits * (runs - hits) / runs + z**2 / 4) / (runs + z**2)
    return middle - half, middle + half


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=300, help="a kind of routing; 0 leaves this part out"
    )
    parser.add_argument("--trend-runs", type=int, default=100, help="0 leaves this part out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a part that was left out is kept as it is there")
    given = parser.parse_args()
    stored = json.loads(given.json.read_text("utf-8")) if given.json and given.json.exists() else {}
    about = {"environment": describe(), "seed": given.seed}
    if given.runs:
        stored["coverage"] = {**about, "rows": _coverages(given.runs, given.seed)}
    if given.trend_runs:
        stored["uniform"] = {**about, **trends(given.trend_runs, given.seed)}
        _print_trends(stored["uniform"])
    if given.json:
        given.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def _coverages(runs: int, seed: int) -> list[dict[str, Any]]:
    print("| routing | interval | runs | covers the truth | 95 % | bias | error |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in SCENARIOS:
        for row in coverage(name, runs, seed):
            rows.append(row)
            low, high = row["covered_interval"]
            print(
                f"| {row['routing']} | {row['interval']} | {row['runs']} | {row['covered']:.1%} | {low:.1%} to "
                f"{high:.1%} | {row['bias']:+.4f} | {row['error']:.4f} |",
                flush=True,
            )
    return rows


def _print_trends(trend: dict[str, Any]) -> None:
    low, high = trend["corrected_trend_interval"]
    print(
        f"\nUniform routing, {trend['runs']} cells: raw Gini has a trend over batch sizes in {trend['raw_trend']:.0%} "
        f"({trend['mean_raw_slope']:+.4f} a doubling), corrected Gini in {trend['corrected_trend']:.1%} "
        f"({low:.1%} to {high:.1%}; {trend['mean_corrected_slope']:+.5f} a doubling; 5 % are expected), at equal token "
        f"counts {trend['corrected_trend_at_equal_tokens']:.1%}."
    )


if __name__ == "__main__":
    sys.exit(main())
