"""The steps of the check, in their order: what each runs, and how it is judged."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import sys
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

from . import sanitizer
from .results import Results
from .step import Context, Outcome, Running, Step

TEST_FILE_LIMIT_S = 300


def _own(name: str, what: str, limit_s: float, *, needed: bool = False) -> Step:
    """A step that is a module of this folder."""

    def run(context: Context) -> Running:
        code = yield context.child(name)
        values = context.figures(name).values
        if code == 124:
            return Outcome("failed", f"time ran out; {len(values)} results are kept: run it again")
        if code:
            return Outcome("failed", f"exit {code}: see the log")
        if missing := values.get("not there"):
            return Outcome("not there", str(missing))
        return Outcome("passed", str(values.get("summary", f"{len(values)} results")))

    return Step(name, what, limit_s, run, needed)


def _build(context: Context) -> Running:
    if context.dry and importlib.util.find_spec("dodoco_ext"):
        # Dry, what is installed serves.
        code = yield [sys.executable, "-c", "import dodoco_ext._C as c; print(c.version)"]
        return Outcome("failed" if code else "passed", f"exit {code}" if code else "as installed")
    new = context.state / "site.new"
    shutil.rmtree(new, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    code = yield [*pip, "--no-build-isolation", "--no-deps", "--target", str(new), "."]
    if code == 0:
        shutil.rmtree(context.site, ignore_errors=True)
        new.rename(context.site)
        code = yield [sys.executable, "-c", "import dodoco_ext._C as c; print(c.__file__)"]
    if code:
        return Outcome("failed", f"exit {code}: see the log")
    return Outcome("passed", "into a folder of its own, with this interpreter")


def _tests(context: Context) -> Running:
    """Every file in a process of its own: a kernel that fails takes its process with it, and no other."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    figures, status = context.figures("tests"), 0
    for path in sorted((context.root / "tests" / "gpu").glob("test_*.py")):
        report = context.state / "tests.xml"
        report.unlink(missing_ok=True)
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-rs",
            "-p",
            "no:cacheprovider",
        ]
        limit = ["timeout", "-k", "5", str(TEST_FILE_LIMIT_S)]
        code = yield [*limit, *pytest, "--timeout=200", f"--junitxml={report}", str(path)]
        status = status or code
        if not collect(report, found):
            found["failed"].append(f"{path.name}: ended with {code} and no report")
        for state, names in found.items():
            figures.put(state, len(names) if state == "passed" else names)
    detail = ", ".join(f"{len(names)} {state}" for state, names in found.items())
    if not status and not found["passed"]:
        return Outcome("not there", f"{detail}: {found['skipped'][0] if found['skipped'] else ''}")
    return Outcome("failed" if status or found["failed"] else "passed", detail)


def collect(report: Path, found: dict[str, list[str]]) -> bool:
    """Sorts the tests of a JUnit report by their outcome. False if there is no whole report."""
    try:
        root = xml.etree.ElementTree.parse(report).getroot()
    except (OSError, xml.etree.ElementTree.ParseError):
        return False
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if (skip := case.find("skipped")) is not None:
            found["skipped"].append(f"{name}: {skip.get('message')}")
        else:
            bad = case.find("failure") is not None or case.find("error") is not None
            found["failed" if bad else "passed"].append(name)
    return True


STEPS = {
    step.name: step
    for step in (
        Step("build", "install into a folder of its own", 240, _build, needed=True),
        _own("machine", "GPU, driver, versions, tools", 90, needed=True),
        Step("tests", "pytest -m gpu tests/gpu", 540, _tests),
        Step(
            "memcheck", "compute-sanitizer, out of bounds", 300, partial(sanitizer.run, "memcheck")
        ),
        Step("racecheck", "compute-sanitizer, races", 300, partial(sanitizer.run, "racecheck")),
        _own("kernel", "the kernel against other ways to count, in graphs", 420),
        _own("launch", "eager launches: host and GPU time", 120),
        _own("decode", "a transformers MoE that decodes in CUDA graphs", 400),
    )
}
OWN = ("machine", "kernel", "launch", "decode", "workload")


def run_child(arguments: argparse.Namespace) -> int:
    """Runs a step's Python in this process: `main(dry, effort, results)` of the module of its name."""
    name = arguments.child
    assert name in OWN, name
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    results = Results(Path(arguments.state) / f"{name}.json", arguments.key)
    return int(module.main(arguments.dry, arguments.effort, results) or 0)
