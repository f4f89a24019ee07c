"""What `dodoco metrics` costs beside a large server: 61 layers of 256 experts on 8 ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from .figures import TOLERANCE, Figures
from .interleave import Summary

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from dodoco_ext.placement_spec import PlacementSpec
from served import Served, server, work

RANKS, LAYERS, EXPERTS, TOP_K = 8, 61, 256, 8
LIMIT_S, LIMIT_MIB, LIMIT_SERIES = 0.05, 95.0, 4000  # 100 MB
TOKENS = (4, 100, 1100)  # a pass of every size class

# The exporter as it is run, but scraped by itself: CPU time of every scrape, over HTTP, and its memory. For
# every line of its input it scrapes once and answers; an empty one ends it.
EXPORTER = """
import json, sys, time, urllib.request
from pathlib import Path
from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.server import Server
from dodoco_ext.views.exporter.state import State
clock = [time.time_ns()]
state = State([Path(sys.argv[1])], window_s=60, waits=sys.argv[2] == "waits", clock=lambda: clock[0])
server = Server(("127.0.0.1", 0), registry_of(state), state)
for line in sys.stdin:
    kind, seconds = line.split()
    clock[0] += int(float(seconds) * 1e9)
    cpu, wall = time.process_time(), time.perf_counter()
    if kind == "tick":
        state.tick()
        body = b""
    else:
        body = urllib.request.urlopen(server.url).read()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    series = sum(1 for row in body.splitlines() if not row.startswith(b"#"))
    status = Path("/proc/self/status").read_text()  # not getrusage(): that knows the parent's too
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps([cpu, wall, series, len(body), peak]), flush=True)
"""


class Exporter:
    """An exporter in a process of its own."""

    def __init__(self, folder: Path, mode: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", "-c", EXPORTER, str(folder), mode]
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, kind: str, seconds: float = 1.0) -> list[float]:
        """CPU time, wall time, series, bytes, and the most memory so far in MiB."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{kind} {seconds}\n")
        self.child.stdin.flush()
        found: list[float] = json.loads(self.child.stdout.readline())
        return found

    def end(self) -> None:
        self.child.communicate()


@pytest.fixture
def ranks(recordings: Path) -> Iterator[list[Served]]:
    made = server(RANKS, layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, max_bytes=8 << 20)
    yield made
    for rank in made:
        rank.close()


SLOTS = np.concatenate([np.arange(EXPERTS), np.arange(32)])


def place(ranks: list[Served], rng: np.random.Generator) -> None:
    """Every layer of every rank gets other places for its experts."""
    maps = {layer: rng.permutation(SLOTS) for layer in range(LAYERS)}
    for rank in ranks:
        rank.recorder.record_placement(maps, RANKS)


def test_a_scrape_of_a_large_server_with_a_load_balancer(
    figures: Figures, recordings: Path
) -> None:
    """Between rearrangements, and after one of all layers."""
    room = PlacementSpec(len(SLOTS), 4)
    ranks = server(
        RANKS,
        layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_bytes=8 << 20,
        placements=room,
    )
    rng = np.random.default_rng(0)
    exporter = Exporter(ranks[0].path.parent, "no-wait")
    place(ranks, rng)
    for seed in range(3):
        for tokens in TOKENS:
            work(ranks, tokens=tokens, seed=seed)
        exporter.ask("scrape", 60)
    between, after = [], []
    for seed in range(figures.blocks(30)):
        work(ranks, tokens=4, seed=seed)
        between.append(exporter.ask("scrape", 0.1))
        place(ranks, rng)
        work(ranks, tokens=4, seed=seed + 1)
        after.append(exporter.ask("scrape", 0.1))
    exporter.end()
    for rank in ranks:
        rank.close()
    table = figures.table(
        f"dodoco metrics with placements: {LAYERS} layers, {EXPERTS} experts, {len(SLOTS)} slots, {RANKS} ranks",
        ("scrape", "CPU ms (p20/p50/p80)", "MiB"),
    )
    for name, scrapes in (("nothing moved", between), ("every layer moved", after)):
        cpu = Summary.of(np.array([each[0] for each in scrapes]))
        values = " / ".join(f"{value * 1e3:.1f}" for value in (cpu.p20, cpu.p50, cpu.p80))
        table.rows.append((name, values, f"{max(each[4] for each in scrapes):.0f}"))
        figures.add(f"exporter/placements/{name}", cpu)


@pytest.mark.parametrize("mode", ["waits", "no-wait"])
def test_a_scrape_of_a_large_server(figures: Figures, ranks: list[Served], mode: str) -> None:
    exporter = Exporter(ranks[0].path.parent, mode)
    # Three windows: the simulations of the nulls are done once and kept.
    for seed in range(3):
        for tokens in TOKENS:
            work(ranks, tokens=tokens, seed=seed)
        first = exporter.ask("scrape", 60)
    scrapes, ticks = [first], []
    for seed in range(figures.blocks(60)):
        work(ranks, tokens=4, seed=seed)
        ticks.append(exporter.ask("tick", 1.0)[0])
        scrapes.append(exporter.ask("scrape", 0.1))
    exporter.end()
    cpu = Summary.of(np.array([each[0] for each in scrapes]))
    wall = Summary.of(np.array([each[1] for each in scrapes]))
    series, size, peak = (max(each[i] for each in scrapes) for i in (2, 3, 4))
    tick = Summary.of(np.array(ticks))
    table = figures.table(
        f"dodoco metrics for {LAYERS} layers of {EXPERTS} experts on {RANKS} ranks",
        (
            "transfers",
            "series",
            "kB",
            "scrape, CPU ms (p20/p50/p80)",
            "wall ms",
            "tick, CPU ms",
            "MiB",
        ),
    )
    p20, p50, p80 = (value * 1e3 for value in (cpu.p20, cpu.p50, cpu.p80))
    table.rows.append(
        (
            "read" if mode == "waits" else "not read",
            f"{series:.0f}",
            f"{size / 1000:.0f}",
            f"{p20:.1f} / {p50:.1f} / {p80:.1f}",
            f"{wall.p50 * 1e3:.1f}",
            f"{tick.p50 * 1e3:.1f}",
            f"{peak:.0f}",
        )
    )
    assert LAYERS * RANKS < series < LIMIT_SERIES
    assert peak < LIMIT_MIB
    figures.add(f"exporter/{mode}/tick", tick)
    figures.add(f"exporter/{mode}/scrape wall", wall)
    figures.judge(f"exporter/{mode}/scrape", cpu, LIMIT_S, slack=LIMIT_S * (1 + TOLERANCE))
