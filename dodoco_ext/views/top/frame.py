"""One picture of the live view, as data: what the terminal shows and `--once` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.cost_of_imbalance import Cost
from dodoco_ext.views.top.figures import Row


@dataclass(frozen=True)
class Choice:
    """What may be looked at: all ranks of a run, or one recording.

    Attributes:
        run: Name of the run.
        recording: Unique id of the recording; None: all ranks of the run.
        text: What to call it.
    """

    run: str
    recording: str | None
    text: str

    def means(self, other: Choice | None) -> bool:
        """Whether two choices mean the same, whatever they are called now."""
        return other is not None and (self.run, self.recording) == (other.run, other.recording)


@dataclass(frozen=True)
class CostLine:
    """What imbalance costs, and how that is known.

    Attributes:
        cost: The sums.
        basis: `dispatch`, `placed`, `counts` or `expert`; "" where nothing was counted.
        num_ranks: Ranks that share the experts.
        pass_chance: What uniform routing would wait in passes taken one by one, where they were summed.
    """

    cost: Cost
    basis: str
    num_ranks: int
    pass_chance: float = nan

    @property
    def text(self) -> str:
        """One line of at most 80 characters."""
        cost = self.cost
        if not cost.steps:
            return "Waiting for the hottest rank: nothing was routed in this time."
        chance, waiting = percent(cost.waiting_by_chance), percent(cost.waiting)
        factor = f"{cost.speedup:.{2 if cost.speedup < 10 else 1}f}x as fast"
        if self.basis == "expert":
            return f"One rank, by expert: {waiting} waiting (chance {chance}); balanced: {factor}"
        bound = ">= " if self.basis in ("counts", "placed") else ""
        return (
            f"Ranks wait {bound}{waiting} of expert time (chance {chance}); "
            f"balanced: {bound}{factor}"
        )

    @property
    def scope(self) -> str:
        """How that is known, in a few words."""
        if self.basis == "dispatch":
            return f"{self.num_ranks} ranks, each of {self.cost.steps} dispatches as recorded"
        if self.basis in ("counts", "placed"):
            alone = percent(self.pass_chance)
            how = "contiguous experts assumed" if self.basis == "counts" else "experts as placed"
            return f"{self.num_ranks} ranks, {how}; passes summed: each alone, by chance, {alone}"
        if self.basis == "expert":
            return "as if every expert were a rank"
        return ""


@dataclass(frozen=True)
class LastPass:
    """One of the last passes of a layer at one rank."""

    rank: int
    iteration: int
    time_ns: int
    tokens: int
    gini: float
    peak: float


@dataclass(frozen=True, eq=False)
class Frame:
    """All that is shown.

    Attributes:
        waiting: What is waited for where there is nothing to show; "" otherwise.
        choice: What is looked at.
        choices: What else there is.
        cost: What imbalance costs.
        status: Run, ranks and their states, rate, span; one line.
        notes: What else has to be said, a line each.
        rows: The layers.
        span: `last 42 s` or `whole run`.
        rank_tokens: Tokens that each rank routed in the span.
        tail: Records of the last passes, with their ranks.
    """

    waiting: str
    choice: Choice | None = None
    choices: tuple[Choice, ...] = ()
    cost: CostLine = CostLine(Cost(), "", 1)
    status: str = ""
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    span: str = ""
    rank_tokens: Mapping[int, int] | None = None
    tail: tuple[tuple[int, NDArray[np.void]], ...] = ()

    def row(self, name: str) -> Row | None:
        """The layer of a name."""
        return next((row for row in self.rows if row.name == name), None)

    def last_passes(self, row: Row, most: int) -> tuple[LastPass, ...]:
        """The last passes of a layer, latest first."""
        found = []
        for rank, records in reversed(self.tail):
            mine = records[records["layer"] == row.index][-most:]
            ginis = metrics.gini_from_numerator(
                mine["gini_numerator"], mine["assignments"], row.num_experts
            )
            for record, gini in zip(mine, np.atleast_1d(ginis), strict=True):
                peak = row.num_experts * int(record["max_count"]) / int(record["assignments"])
                number, time_ns = int(record["iteration"]), int(record["time_ns"])
                tokens = int(record["tokens"])
                found.append(LastPass(rank, number, time_ns, tokens, float(gini), peak))
            if len(found) >= most * 2:
                break
        return tuple(sorted(found, key=lambda p: -p.time_ns)[:most])


def cost_line(
    costs: tuple[Cost, Cost, Cost],
    num_ranks: int,
    pass_chance: float = nan,
    *,
    placed: bool = False,
) -> CostLine:
    """The best that is known: recorded dispatches, else ranks by placement, else experts.

    Args:
        costs: By dispatch, by counts and by pass.
        num_ranks: Ranks that share the experts, the largest of any layer.
        pass_chance: What uniform routing would wait in passes one by one.
        placed: Whether experts lie as recorded.
    """
    by_dispatch, by_counts, by_pass = costs
    if by_dispatch.steps:
        return CostLine(by_dispatch, "dispatch", num_ranks)
    if num_ranks > 1:
        return CostLine(by_counts, "placed" if placed else "counts", num_ranks, pass_chance)
    if by_pass.steps:
        return CostLine(by_pass, "expert", 1)
    return CostLine(by_counts, "expert", 1)


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f} %" if isfinite(share) else "?"
