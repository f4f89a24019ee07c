"""Recordings of servers for the exporter: routed layers, a group of ranks, transfers; without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dodoco_ext import _C
from dodoco_ext.capture import Capture
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder, Uncovered
from dodoco_ext.settings import Settings
from dodoco_ext.transfers import COMBINE, DISPATCH

LABELS = {"model_name": "tiny"}


class Served:
    """The open recording of one rank.

    Args:
        rank: Global rank.
        group: Global ranks of its group; () for none.
        layers: Number of layers.
        num_experts, top_k: Of every layer.
        labels, uncovered, run, max_bytes, placements: As the recorder takes them.
    """

    def __init__(
        self,
        rank: int = 0,
        group: Sequence[int] = (),
        *,
        layers: int = 2,
        num_experts: int = 8,
        top_k: int = 2,
        labels: Mapping[str, str] = LABELS,
        uncovered: Sequence[Uncovered] = (),
        run: str = "serve",
        max_bytes: int = 1 << 20,
        world_size: int | None = None,
        folder: Path | None = None,
        placements: PlacementSpec | None = None,
    ) -> None:
        settings = Settings(
            folder or Settings.from_environment().directory,
            max_bytes,
            run=run,
            rank=rank,
            world_size=world_size or max(len(group), rank + 1),
        )
        self.specs = [
            LayerSpec(f"model.layers.{i}.mlp.gate", num_experts, top_k) for i in range(layers)
        ]
        self.rank, self.group, self.num_experts = rank, tuple(group), num_experts
        self.place = self.group.index(rank) if group else 0
        self.recorder = Recorder(
            self.specs,
            uncovered=uncovered,
            group=GroupSpec(self.group, self.place) if group else None,
            labels=labels,
            placements=placements,
            settings=settings,
        )
        self.path = self.recorder.path
        self._capture = Capture(self.recorder, advances=False) if group else None
        self._sites = [np.zeros(_C.SITE_BYTES // 8, np.int64) for _ in self.specs]
        for index, site in enumerate(self._sites):
            self.recorder.bind(index, site, site.ctypes.data)

    def route(self, layer: int, ids: Sequence[Sequence[int]] | np.ndarray) -> None:
        """One pass, ids [T, k]."""
        array = np.ascontiguousarray(ids, np.int64)
        rows, k = array.shape
        site, data = self._sites[layer].ctypes.data, array.ctypes.data
        assert _C.route_ids(site, data, 8, rows, k, k, 1, False) == 0

    def route_all(self, tokens: int, seed: int = 0, skew: float = 0.0) -> None:
        """A pass of so many tokens at every layer; `skew` favours the later experts."""
        rng = np.random.default_rng(seed)
        for layer, spec in enumerate(self.specs):
            scores = rng.gumbel(size=(tokens, spec.num_experts))
            scores += skew * np.linspace(-1, 1, spec.num_experts)
            self.route(layer, np.argsort(-scores, axis=1)[:, : spec.top_k])

    def exchange(
        self,
        matrix: Sequence[Sequence[int]],
        *,
        layer: int = 0,
        op: int = DISPATCH,
        lasted_ns: int = 1000,
        experts: Sequence[int] | None = None,
        unit: str = "assignment",
        bytes_per_row: int = 4,
        ended_ns: int | None = None,
        timed: bool = True,
    ) -> None:
        """One transfer of which every rank sent `matrix[source][destination]` rows."""
        assert self._capture is not None
        rows = np.asarray(matrix)
        end = time.monotonic_ns() if ended_ns is None else ended_ns
        self._capture.push(
            layer,
            op,
            rows[self.place].tolist(),
            rows[:, self.place].tolist(),
            end - lasted_ns,
            end,
            experts=experts,
            bytes_per_row=bytes_per_row,
            timed=timed,
            unit=unit,
        )

    def close(self) -> Path:
        """Ends the recording."""
        self.recorder.close()
        return self.path


def server(num_ranks: int, **options: object) -> list[Served]:
    """The open recordings of all ranks of one group."""
    ranks = range(num_ranks)
    return [Served(rank, ranks, **options) for rank in ranks]  # type: ignore[arg-type]


def work(
    ranks: Sequence[Served],
    *,
    tokens: int = 32,
    seed: int = 0,
    skew: float = 0.0,
    late: int | None = None,
    late_ns: int = 0,
) -> None:
    """One iteration of a server: every layer routes, dispatches and combines, at every rank.

    The rank `late` comes late to every transfer: the others' last longer by `late_ns`.
    """
    num_ranks = len(ranks)
    rng = np.random.default_rng(seed)
    for rank in ranks:
        rank.route_all(tokens, seed=seed * 1000 + rank.rank, skew=skew)
    if num_ranks < 2:
        return
    for layer in range(len(ranks[0].specs)):
        matrix = rng.integers(1, tokens, (num_ranks, num_ranks))
        matrix[:, -1] += int(tokens * skew)
        now = time.monotonic_ns()
        for op, each in ((DISPATCH, matrix), (COMBINE, matrix.T)):
            for rank in ranks:
                lasted = 100_000 + (0 if late in (None, rank.rank) else late_ns)
                rank.exchange(each, layer=layer, op=op, lasted_ns=lasted, ended_ns=now)
