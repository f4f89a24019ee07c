"""How far raw, floor-subtracted and corrected Gini are from known truths, as a Markdown table.

Passes are drawn from routers whose true Gini is known (the Gini of their inclusion probabilities).
An estimate uses ``--passes`` passes; it is repeated over ``--seeds`` independent sets, and fails
where its error is beyond the limit (0.03 below 16 tokens per expert, 0.01 from 16 up). Needs numpy
and the package, no torch.

    python benchmarks/corrected_gini.py
    python benchmarks/corrected_gini.py --experts 8 --top-k 2 --shapes bell
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import nulls, sampling
from dodoco_ext.metrics import gini

FloatArray = NDArray[np.float64]


def bell(num_experts: int, strength: float) -> FloatArray:
    """Normal log weights: what a softmax router with spread-out logits looks like."""
    grid = (np.arange(num_experts) + 0.5) / num_experts
    return strength * np.array([NormalDist().inv_cdf(float(x)) for x in grid])


def zipf(num_experts: int, strength: float) -> FloatArray:
    """Weight falls as a power of the expert's rank."""
    return -strength * np.log(np.arange(1, num_experts + 1))


def hot(num_experts: int, strength: float) -> FloatArray:
    """One expert in eight is hot, all others alike."""
    return np.where(np.arange(num_experts) % 8 == 0, strength, 0.0)


def cold(num_experts: int, strength: float) -> FloatArray:
    """One expert in four is cold, all others alike."""
    return np.where(np.arange(num_experts) % 4 == 0, -strength, 0.0)


def moving(num_experts: int, strength: float) -> FloatArray:
    """As bell, but each pass deals the loads to other experts: passes are not routed alike."""
    return bell(num_experts, strength)


SHAPES: dict[str, Callable[[int, float], FloatArray]] = {
    "bell": bell,
    "zipf": zipf,
    "hot": hot,
    "cold": cold,
    "moving": moving,
}
TRUTHS = {
    "bell": (0.0, 0.08, 0.28, 0.53),
    "zipf": (0.3, 0.53),
    "hot": (0.3,),
    "cold": (0.2,),
    "moving": (0.28,),
}


@dataclass(frozen=True)
class Errors:
    """Errors of one estimator over the seeds, [S]."""

    values: FloatArray
    limit: float

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def worst(self) -> float:
        return float(self.values[np.abs(self.values).argmax()])

    @property
    def failure_rate(self) -> float:
        return float((np.abs(self.values) > self.limit).mean())

    def __str__(self) -> str:
        return f"{self.mean:+.3f} / {self.worst:+.3f} / {self.failure_rate:.0%}"


def weights_for(shape: str, truth: float, num_experts: int, top_k: int) -> tuple[FloatArray, float]:
    """Log weights [E] of the shape whose true Gini is nearest the truth, and that Gini."""
    if truth == 0:
        return np.zeros(num_experts), 0.0
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        weights = SHAPES[shape](num_experts, middle)
        reached = float(gini(sampling.inclusion_probabilities(weights, top_k)))
        low, high = (middle, high) if reached < truth else (low, middle)
    return weights, reached


def measure(
    shape: str,
    weights: FloatArray,
    truth: float,
    num_tokens: int,
    args: argparse.Namespace,
    limit: float,
) -> dict[str, Errors]:
    """Errors of every estimator for one router and one pass size."""
    num_experts, top_k = args.experts, args.top_k
    rng = np.random.default_rng([args.seed, num_tokens, int(truth * 1e6)])
    draws = args.passes * args.seeds
    counts = sampling.sample_counts(rng, num_tokens, num_experts, top_k, draws, weights)
    if shape == "moving":
        counts = rng.permuted(counts, axis=-1)
    counts = counts.reshape(args.seeds, args.passes, num_experts)
    raw = np.asarray(gini(counts))
    sizes = (num_tokens, num_experts, top_k)
    estimates = {
        "raw": raw.mean(axis=1),
        "raw - floor": raw.mean(axis=1) - nulls.null(*sizes).gini_mean,
        "corrected": np.array([nulls.corrected_gini(g, *sizes) for g in raw]),
    }
    if not args.no_counts:
        pooled = counts.sum(axis=1)
        estimates["corrected, counts"] = np.array(
            [nulls.corrected_gini(g, *sizes, counts=c) for g, c in zip(raw, pooled, strict=True)]
        )
    return {name: Errors(values - truth, limit) for name, values in estimates.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--passes", type=int, default=200, help="passes an estimate uses")
    parser.add_argument("--seeds", type=int, default=100, help="independent sets of passes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole run")
    parser.add_argument("--tokens-per-expert", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--no-counts", action="store_true", help="leave out the estimator that is given counts"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 0."""
    args = parse(argv)
    print(
        f"{args.experts} experts, top-{args.top_k}, {args.passes} passes an estimate, {args.seeds} "
        "estimates. Cells: mean error / worst error / share beyond the limit.\n"
    )
    header: list[str] | None = None
    for shape in args.shapes:
        for wanted in TRUTHS[shape]:
            weights, truth = weights_for(shape, wanted, args.experts, args.top_k)
            for tokens_per_expert in args.tokens_per_expert:
                num_tokens = max(1, round(tokens_per_expert * args.experts / args.top_k))
                limit = 0.03 if tokens_per_expert < 16 else 0.01
                cells = measure(shape, weights, truth, num_tokens, args, limit)
                if header is None:
                    header = ["router", "truth", "tokens/expert", *cells]
                    print("| " + " | ".join(header) + " |")
                    print("|---" * len(header) + "|")
                name = "uniform" if not truth else shape
                row = [name, f"{truth:.3f}", str(tokens_per_expert), *map(str, cells.values())]
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
