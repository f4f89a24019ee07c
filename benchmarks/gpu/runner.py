"""Runs the steps in processes of their own, within the time there is, and writes what came of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

from . import report
from .results import Results, write_whole
from .step import Context, Outcome, Step
from .steps import STEPS

LOG_TAIL_BYTES = 1 << 19
MIN_SECONDS = 20
SOURCES = ("csrc", "dodoco_ext", "triton_kernels", "benchmarks/gpu", "tests/gpu")


def run(arguments: argparse.Namespace, root: Path) -> int:
    """Runs what is not finished. Returns 0 if every step that could run passed."""
    state: Path = arguments.state
    if arguments.again:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    environment: dict[str, Any] = dict(describe())
    environment["commit"] = os.environ.get("DODOCO_COMMIT") or environment["commit"]
    environment["gpu"] = gpu_name()
    key = " ".join(
        [str(environment["commit"]), digest(root), environment["gpu"] or "no GPU"]
        + ["dry"] * arguments.dry
    )
    results = Results(state / "steps.json", key)
    context = Context(root, state, key, arguments.dry, arguments.effort)
    deadline = time.monotonic() + arguments.seconds
    try:
        for name in arguments.steps.split(","):
            step = STEPS[name]
            if results.values.get(name, {}).get("state") == "passed" and (
                name != "build" or arguments.dry or context.site.is_dir()
            ):
                print(f"{name}: finished before", flush=True)
                continue
            left = deadline - time.monotonic()
            if left < MIN_SECONDS and not arguments.dry:
                print(f"{name}: no time left; run the same command again", flush=True)
                results.put(name, Outcome("not run", "no time left").as_dict())
                continue
            print(f"{name}: {step.what}", flush=True)
            started = time.monotonic()
            outcome = run_step(step, context, min(step.limit_s, left))
            outcome.seconds = round(time.monotonic() - started, 1)
            results.put(name, outcome.as_dict())
            print(f"{name}: {outcome.state} ({outcome.seconds:.0f} s) {outcome.detail}", flush=True)
            publish(arguments.out, results, context, environment)
            if step.needed and outcome.state != "passed":
                print("the other steps need this one", flush=True)
                break
    finally:
        markdown = publish(arguments.out, results, context, environment)
    print(markdown)
    for name in arguments.steps.split(","):
        state = results.values.get(name, {"state": "not run"})["state"]
        if state != "passed" and (STEPS[name].needed or state != "not there"):
            return 1
    return 0


def digest(root: Path) -> str:
    """Stands for the sources that a result depends on: results of others are forgotten."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu") and path.is_file():
                total.update(f"{path.relative_to(root)}\0".encode())
                total.update(path.read_bytes())
    return total.hexdigest()[:12]


def gpu_name() -> str | None:
    """What nvidia-smi calls the first GPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.partition("\n")[0].strip() or None


def run_step(step: Step, context: Context, limit_s: float) -> Outcome:
    """Runs a step's commands one after the other."""
    log, deadline = context.state / f"{step.name}.log", time.monotonic() + limit_s
    log.unlink(missing_ok=True)
    running = step.run(context)
    try:
        command = next(running)
        while True:
            code = start(command, context, log, deadline - time.monotonic())
            command = running.send(code)
    except StopIteration as end:
        return end.value


def start(command: list[str], context: Context, log: Path, limit_s: float) -> int:
    """Runs a command; its output goes to a log. Returns its exit status, or 124 after the limit."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=context.root,
            env=context.environment(),
            start_new_session=True,
        )
        try:
            return process.wait(max(limit_s, 1))
        except subprocess.TimeoutExpired:
            return 124
        finally:
            # Its own session and no other: also what it started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def publish(out: Path, results: Results, context: Context, environment: dict[str, Any]) -> str:
    """Writes JSON, Markdown and log into the folder that leaves the machine."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment,
        "dry": context.dry,
        "steps": results.values,
        "figures": {name: context.figures(name).values for name in STEPS},
    }
    machine = content["figures"].get("machine", {})
    told = ("summary", "not there")
    environment.update({k: v for k, v in machine.items() if k not in told})
    write_whole(out / "gpu-check.json", json.dumps(content, indent=1))
    markdown = report.as_markdown(content)
    write_whole(out / "gpu-check.md", markdown)
    logs = []
    for name in STEPS:
        path = context.state / f"{name}.log"
        if path.exists():
            data = path.read_bytes()[-LOG_TAIL_BYTES:]
            logs.append(f"==== {name} ====\n{data.decode(errors='replace')}")
    # Paths of the machine are nobody's business in a file that is shared.
    text = "\n".join(logs)
    for place, name in ((context.state, "(state)"), (context.root, "."), (sys.prefix, "(python)")):
        text = text.replace(str(place), name)
    write_whole(out / "gpu-check.log", text)
    return markdown
