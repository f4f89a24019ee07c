"""What recording costs a vLLM server: CPU seconds of all its processes a generated token, with and without.

    VLLM_PYTHON=build/vllm/bin/python .venv/bin/python benchmarks/vllm_overhead.py --out FILE.json

One eager server, real HTTP clients. Each round serves the same requests with the recorder, without it, and
without it once more, in random order; the last tells what the method itself scatters. Fails where the whole
interval of the ratio lies above 1.03.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tests" / "engines")]

from environment import describe  # noqa: E402
from interleave import Summary  # noqa: E402

from dodoco_ext.errors import RecordingError  # noqa: E402
from dodoco_ext.recording import Reader  # noqa: E402
from vllm_models import build  # noqa: E402
from vllm_server import Server, add_plugin, serving, site_of  # noqa: E402

CLIENTS, REQUESTS, TOKENS, LIMIT = 4, 1, 100, 1.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--model", default="qwen3_moe")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        add_plugin(site_of(where), HERE / "vllm_toggle.py")
        model = build(asked.model, where / "model")
        with serving(model, where, "--enforce-eager", "--no-enable-prefix-caching") as server:
            seconds = measure(server, asked.rounds)
    figures = {}
    for column, what in enumerate(("server", "worker alone")):
        with_it, without, again = (seconds[n][:, column] for n in ("with", "without", "again"))
        figures |= {
            f"{what}: with over without": Summary.of(with_it / without),
            f"{what}: without over itself": Summary.of(again / without),
            f"{what}: CPU ms a token with": Summary.of(with_it * 1e3),
            f"{what}: CPU ms a token without": Summary.of(without * 1e3),
        }
    for name, figure in figures.items():
        print(f"{name}: {figure.p50:.4f} (95 % interval {figure.low:.4f} to {figure.high:.4f})")
    if asked.out is not None:
        load = {"clients": CLIENTS, "requests of each a round": REQUESTS, "tokens": TOKENS}
        found = {name: asdict(figure) for name, figure in figures.items()}
        text = {"environment": describe(), "model": asked.model, "load": load, "figures": found}
        asked.out.write_text(json.dumps(text, indent=1) + "\n")
    return int(figures["server: with over without"].low > LIMIT)


def measure(server: Server, rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds a generated token, by contestant, [rounds, 2]: all processes, the worker's alone."""
    worker = int(server.reader.header["owner_pid"])
    seconds = {name: np.empty((rounds, 2)) for name in ("with", "without", "again")}
    rng = np.random.default_rng(0)
    load(server)  # warm
    for turn in range(rounds):
        for name in rng.permutation(list(seconds)):
            switch(server, worker, on=name == "with")
            server.complete([3, 2, 1], max_tokens=10)  # being put in or taken out costs by itself
            before = np.array((cpu_seconds(server), of_process(worker)))
            load(server)
            after = np.array((cpu_seconds(server), of_process(worker)))
            seconds[name][turn] = (after - before) / (CLIENTS * REQUESTS * TOKENS)
            counted(server, on=name == "with")
    return seconds


def load(server: Server) -> None:
    """The same requests every time."""

    def ask(client: int) -> None:
        for request in range(REQUESTS):
            server.complete([client + 1, request + 1, 7, 8, 9], max_tokens=TOKENS)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cpu_seconds(server: Server) -> float:
    """CPU time of all processes of the server so far."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            if os.getpgid(pid) == server.process.pid:
                total += of_process(pid)
        except OSError:
            continue  # ended meanwhile
    return total


def of_process(pid: int) -> float:
    """CPU seconds of another process, whose clock is named as clock_getcpuclockid(3) does."""
    return time.clock_gettime((~pid << 3) | 2)


def live(server: Server) -> list[Reader]:
    found = []
    for path in server.recordings:
        with contextlib.suppress(RecordingError):  # being created, or pruned
            found.append(Reader(path))
    return [reader for reader in found if reader.state == "live"]


def switch(server: Server, worker: int, *, on: bool) -> None:
    if bool(live(server)) == on:
        return
    os.kill(worker, signal.SIGUSR1)
    until = time.monotonic() + 20
    while bool(live(server)) != on:
        assert time.monotonic() < until, "the worker did not hear"
        time.sleep(0.01)


def counted(server: Server, *, on: bool) -> None:
    """That what was measured is what it is called."""
    tokens = [reader.snapshot().layers[0].tokens for reader in live(server)]
    assert bool(tokens) == on
    assert not on or tokens[0] >= CLIENTS * REQUESTS * TOKENS


if __name__ == "__main__":
    sys.exit(main())
