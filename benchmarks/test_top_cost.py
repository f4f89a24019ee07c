"""What `dodoco top` costs: processor time of a look and of drawing it, at 61 layers, 256 experts, 8 ranks."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from dodoco_ext import _C
from dodoco_ext.capture import Capture
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.settings import Settings
from dodoco_ext.transfers import DISPATCH
from dodoco_ext.views.top.session import Session

from .figures import Figures

LAYERS, EXPERTS, TOP_K, RANKS = 61, 256, 8, 8
LOOKS = 20
PASSES = 10  # between two looks: ten iterations a second
TOKENS = 64
LIMIT_S = (
    0.25  # of processor time for a look and its drawing: a quarter of a core at one look a second
)


class Job:
    """Eight ranks that record passes, and dispatches if asked."""

    def __init__(self, folder: Path, *, dispatches: bool) -> None:
        rng = np.random.default_rng(0)
        scores = rng.gumbel(size=(16, TOKENS, EXPERTS)) + 0.5 * rng.standard_normal(EXPERTS)
        self._ids = np.ascontiguousarray(np.argsort(-scores, axis=2)[:, :, :TOP_K])
        specs = [LayerSpec(f"model.layers.{i}.mlp.gate", EXPERTS, TOP_K) for i in range(LAYERS)]
        self._ranks = []
        self._captures: list[Capture] = []
        self._matrix = rng.integers(0, 128, (RANKS, RANKS)).tolist()
        self._next = 0
        for rank in range(RANKS):
            settings = Settings(folder, run="big", rank=rank, world_size=RANKS)
            group = GroupSpec(tuple(range(RANKS)), rank) if dispatches else None
            recorder = Recorder(specs, settings=settings, group=group)
            if dispatches:
                self._captures.append(Capture(recorder, advances=False))
            sites = [np.zeros(_C.SITE_BYTES // 8, np.int64) for _ in specs]
            for index, site in enumerate(sites):
                recorder.bind(index, site, site.ctypes.data)
            self._ranks.append((recorder, sites))

    def record(self) -> None:
        for _ in range(PASSES):
            for rank, (_, sites) in enumerate(self._ranks):
                for layer, site in enumerate(sites):
                    ids = self._ids[self._next % len(self._ids)]
                    self._next += 1
                    _C.route_ids(
                        site.ctypes.data, ids.ctypes.data, 8, TOKENS, TOP_K, TOP_K, 1, False
                    )
                    if self._captures:
                        sent, received = self._matrix[rank], [row[rank] for row in self._matrix]
                        self._captures[rank].push(layer, DISPATCH, sent, received, 1000, 2000)

    def close(self) -> None:
        for recorder, _ in self._ranks:
            recorder.close()


def cpu_s() -> float:
    """Processor time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


SIZES = {"look and draw, 80x24": (80, 24), "look and draw, 200x70": (200, 70)}


@pytest.mark.parametrize("what", ["look", "look, dispatches recorded", *SIZES])
def test_top_costs_little(recordings: Path, figures: Figures, what: str) -> None:
    job = Job(recordings, dispatches="dispatches" in what)
    spent = asyncio.run(drawn(job, SIZES[what])) if what in SIZES else looked(job)
    job.close()
    p20, p50, p80 = (float(np.quantile(spent, q)) for q in (0.2, 0.5, 0.8))
    title = f"dodoco top, {LAYERS} layers x {EXPERTS} experts x {RANKS} ranks, CPU a look"
    figures.table(title, ("what", "p20 ms", "p50 ms", "p80 ms")).rows.append(
        (what, *(f"{1000 * value:.0f}" for value in (p20, p50, p80)))
    )
    figures.values[f"top/{what}"] = {"p20": p20, "p50": p50, "p80": p80, "limit": LIMIT_S}
    assert p50 < LIMIT_S, f"{what}: {p50:.3f} s of processor time, at most {LIMIT_S}"


def looked(job: Job) -> list[float]:
    session, spent = Session("big"), []
    for second in range(LOOKS + 3):
        job.record()
        before = cpu_s()
        frame = session.look(float(second))
        spent.append(cpu_s() - before)
    assert len(frame.rows) == LAYERS
    assert frame.cost.cost.steps
    return spent[3:]  # the first ones simulate floors, which are kept


async def drawn(job: Job, size: tuple[int, int]) -> list[float]:
    from dodoco_ext.views.top.app import TopApp

    session, spent = Session("big"), []
    app = TopApp(session, interval_s=None)
    async with app.run_test(size=size) as pilot:
        await pilot.press("5")  # ordered by max/mean: rows move
        for _ in range(LOOKS + 3):
            job.record()
            time.sleep(0.05)  # looks of a real clock are apart
            before = cpu_s()
            await app.look_once()
            await pilot.pause()
            spent.append(cpu_s() - before)
    return spent[3:]
