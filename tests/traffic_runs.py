"""Real recordings of several ranks with known transfers, made by the writer without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dodoco_ext.capture import Capture
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.settings import Settings
from exchanges import Exchange

MILLISECOND = 1_000_000


class Rank:
    """The recording of one rank."""

    def __init__(
        self,
        rank: int,
        group: Sequence[int],
        *,
        world_size: int | None = None,
        specs: Sequence[LayerSpec] | None = None,
        layers: int = 2,
        run: str = "job",
        max_bytes: int = 1 << 19,
        index: int | None = None,
    ) -> None:
        settings = Settings(
            Settings.from_environment().directory,
            max_bytes,
            run=run,
            rank=rank,
            world_size=world_size or len(group),
        )
        named = specs or [LayerSpec(f"layers.{i}.mlp", 8, 2, routed=False) for i in range(layers)]
        place = list(group).index(rank) if index is None else index
        spec = GroupSpec(tuple(group), place) if group else None
        self.place = place
        self.recorder = Recorder(named, group=spec, settings=settings)
        self.path: Path = self.recorder.path
        self.capture = Capture(self.recorder, advances=True) if group else None

    def push(
        self,
        each: Exchange,
        ended_ns: int,
        lasted_ns: int,
        *,
        experts: Sequence[int] | None = None,
        timed: bool = True,
        unit: str = "assignment",
    ) -> int:
        """Records one transfer; returns its iteration."""
        assert self.capture is not None
        matrix = each.matrix
        return self.capture.push(
            each.layer,
            each.type,
            matrix[self.place, :].tolist(),
            matrix[:, self.place].tolist(),
            ended_ns - lasted_ns,
            ended_ns,
            backward=each.backward,
            recompute=each.recompute,
            experts=experts,
            bytes_per_row=4,
            timed=timed,
            unit=unit,
        )

    def close(self) -> Path:
        self.recorder.close()
        return self.path


def record(
    run: Sequence[Exchange],
    ranks: Mapping[int, Rank],
    *,
    spacing_ns: int = MILLISECOND,
    lasted_ns: Sequence[int] | None = None,
    until: Mapping[int, int] | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Records a run at all of its ranks, as if it ended now.

    The last transfer ends a millisecond late, so that no other lies a whole number of `spacing_ns` before
    it: ranks read their clocks apart, and a test must not stand on that difference.

    Args:
        run: What happened.
        ranks: The recordings.
        spacing_ns: From the end of one transfer to that of the next.
        lasted_ns: Duration of every transfer at each rank.
        until: For ranks that died: how many transfers they recorded.
        experts: What each rank says that its experts received, in dispatches.
    """
    now = time.monotonic_ns()
    for each in run:
        before = len(run) - 1 - each.number
        ended = now - before * spacing_ns - MILLISECOND * (before > 0)
        for place, (number, rank) in enumerate(ranks.items()):
            if each.number < (until or {}).get(number, len(run)):
                counts = (experts or {}).get(number) if each.type == 2 else None
                lasted = 1000 if lasted_ns is None else lasted_ns[place]
                rank.push(each, ended, lasted, experts=counts)


def recorded(
    run: Sequence[Exchange], num_ranks: int, layers: int = 2, run_name: str = "job"
) -> list[Path]:
    """Closed recordings of all ranks of a run."""
    ranks = {r: Rank(r, range(num_ranks), layers=layers, run=run_name) for r in range(num_ranks)}
    record(run, ranks)
    return [rank.close() for rank in ranks.values()]
