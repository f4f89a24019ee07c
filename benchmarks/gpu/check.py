"""Builds, tests, sanitizes and measures DODOCO on a machine with a GPU; `make gpu-check` runs it.

    python benchmarks/gpu/check.py --out results/gpu
    python benchmarks/gpu/check.py --steps build,tests --seconds 300
    python benchmarks/gpu/check.py --dry                            # on the CPU, with stand-ins
    python benchmarks/gpu/check.py --into docs/overhead.md          # a stored result, into a page

Needs this interpreter's torch, Triton, pytest, pybind11, ninja and setuptools, a C++ compiler, and no network.
nvcc and compute-sanitizer are used where they are found, transformers for the model. A run that was cut
off goes on where it stopped: finished steps of the same commit, and finished cells of a benchmark, are kept in
results/gpu/state. What comes out is `gpu-check.json`, `gpu-check.md` and `gpu-check.log`.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As the package `benchmarks`, without the checkout in sys.path: its source folders must not be imported.
if "benchmarks" not in sys.modules:
    _package = types.ModuleType("benchmarks")
    _package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = _package

from benchmarks.gpu import report, runner, steps  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Steps: " + "; ".join(f"{step.name}: {step.what}" for step in steps.STEPS.values()),
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", metavar="DIR")
    parser.add_argument("--state", type=Path, default=None, metavar="DIR", help="kept between runs")
    parser.add_argument("--steps", default=",".join(steps.STEPS), metavar="NAMES")
    parser.add_argument("--seconds", type=float, default=560, help="start no step beyond this")
    parser.add_argument("--effort", type=float, default=1.0, help="rounds in units of the usual")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs finished")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with stand-ins, small")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put gpu-check.json into a page")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--key", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.steps.split(",")) - set(steps.STEPS)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: choose from {', '.join(steps.STEPS)}")
    if arguments.state is None:
        arguments.state = ROOT / "results" / "gpu" / ("state-dry" if arguments.dry else "state")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the steps, or one of them in the process that was started for it."""
    arguments = parse(argv)
    if arguments.child:
        return steps.run_child(arguments)
    if arguments.into is not None:
        report.put_into(arguments.into, arguments.out / "gpu-check.json")
        return 0
    arguments.out, arguments.state = arguments.out.resolve(), arguments.state.resolve()
    os.chdir(ROOT)
    return runner.run(arguments, ROOT)


if __name__ == "__main__":
    sys.exit(main())
