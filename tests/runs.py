"""Recordings of runs of several ranks, made without torch, for tests of what reads them as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import planted
from dodoco_ext import _C
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.settings import Settings

SMALL_BYTES = 1 << 19


def rank_of(
    rank: int, world_size: int, specs: Sequence[LayerSpec] | None = None, *, run: str = "job"
) -> planted.Planted:
    """An open recording of one rank, in the environment's folder."""
    folder = Settings.from_environment().directory
    settings = Settings(folder, SMALL_BYTES, run=run, rank=rank, world_size=world_size)
    return planted.Planted(specs or planted.layers(2), settings=settings)


def closed_rank(rank: int, world_size: int, tokens: Sequence[int] = (4,), **options: Any) -> Path:
    """A closed recording of one rank: passes of these many tokens at every layer."""
    made = rank_of(rank, world_size, **options)
    made.route_all(tokens, seed=rank)
    return made.close()


def in_lanes(rank: int, passes: Sequence[tuple[int, int]], lanes: int) -> Path:
    """A closed recording of one layer and several lanes, of passes (lane, tokens)."""
    settings = dataclasses.replace(Settings.from_environment(), run="job", rank=rank, world_size=2)
    recorder = Recorder([LayerSpec("gate", 8, 2)], lanes=lanes, settings=settings)
    site = np.zeros(_C.SITE_BYTES // 8, np.uint64)
    recorder.bind(0, site, site.ctypes.data)
    for lane, tokens in passes:
        ids = np.tile(np.arange(2), (tokens, 1))
        with recorder.use_lane(lane):
            assert _C.route_ids(site.ctypes.data, ids.ctypes.data, 8, tokens, 2, 2, 1, False) == 0
    recorder.close()
    return recorder.path
