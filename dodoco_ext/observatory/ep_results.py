"""What an EP scan found, as plain data that goes to JSON and comes back."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

from dodoco_ext.observatory.result import Interval

FIXED_GLOBAL, FIXED_PER_RANK = "fixed_global", "fixed_per_rank"
"""Names of the arms: as many tokens a pass at every EP size, or as many a rank."""


@dataclass(frozen=True)
class Peak:
    """Max/mean of a pass; mean over passes, then over layers.

    Attributes:
        value: As counted.
        interval: 95 %, passes resampled; nan for fewer than two passes.
        null: Expected under uniform routing of as many tokens.
        null_band: 95 % of single uniformly routed passes, mean over layers.
    """

    value: float
    interval: Interval
    null: float
    null_band: Interval


@dataclass(frozen=True)
class RandomPlacements:
    """Max/mean of ranks under placements at random, each a mean over passes and layers.

    Attributes:
        mean: Over the placements.
        band: 95 % of them.
        best: The smallest, chosen with hindsight on the very passes it is judged by.
        share_below: Share of the placements that are below the contiguous one, ties half.
    """

    mean: float
    band: Interval
    best: float
    share_below: float


@dataclass(frozen=True)
class Change:
    """Relative to the smallest measurable EP size of the arm; 0.05 is 5 % more.

    Attributes:
        relative: Of the value.
        interval: 95 %, passes of both sizes resampled together.
        null: Of what uniform routing gives.
    """

    relative: float
    interval: Interval
    null: float


@dataclass(frozen=True)
class EpPoint:
    """One EP size of an arm.

    Attributes:
        num_ranks: EP.
        reason: Why nothing was measured; empty where it was. The fields below are None or empty then.
        passes, tokens_per_pass: How much was counted.
        expert, rank: Max/mean of experts and of ranks that hold them in equal contiguous runs.
        expert_change, rank_change: From the smallest EP size that was measured.
        random: Ranks under placements at random.
        rank_layers, random_layers: Max/mean of ranks of each layer [L], contiguous and at random.
    """

    num_ranks: int
    reason: str
    passes: int = 0
    tokens_per_pass: int = 0
    expert: Peak | None = None
    rank: Peak | None = None
    expert_change: Change | None = None
    rank_change: Change | None = None
    random: RandomPlacements | None = None
    rank_layers: tuple[float, ...] = ()
    random_layers: tuple[float, ...] = ()

    @property
    def measurable(self) -> bool:
        """Whether there is anything to say at this size."""
        return not self.reason


@dataclass(frozen=True)
class EpArm:
    """A scan over EP sizes.

    Attributes:
        name: `FIXED_GLOBAL` or `FIXED_PER_RANK` tokens.
        expert_by_construction: Max/mean of experts cannot depend on EP here, whatever the model does.
        points: One an EP size.
    """

    name: str
    expert_by_construction: bool
    points: tuple[EpPoint, ...]

    @property
    def measured(self) -> tuple[EpPoint, ...]:
        """The points that hold figures."""
        return tuple(point for point in self.points if point.measurable)


@dataclass(frozen=True)
class EpScan:
    """Both arms for one model and condition.

    Attributes:
        model, condition: Names.
        num_experts: E.
        num_placements, seed: Of the placements at random.
        arms: Fixed global tokens, and fixed tokens a rank.
    """

    model: str
    condition: str
    num_experts: int
    num_placements: int
    seed: int
    arms: tuple[EpArm, ...]

    def arm(self, name: str) -> EpArm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def from_plain(data: dict[str, Any]) -> EpScan:
    """A scan from what `result.plain` made of it, as `grid.json` holds it."""
    return EpScan(**{**data, "arms": tuple(_arm(arm) for arm in data["arms"])})


def _arm(data: dict[str, Any]) -> EpArm:
    return EpArm(**{**data, "points": tuple(_point(point) for point in data["points"])})


def _point(data: dict[str, Any]) -> EpPoint:
    kinds = {
        "expert": Peak,
        "rank": Peak,
        "expert_change": Change,
        "rank_change": Change,
        "random": RandomPlacements,
    }
    found: dict[str, Any] = dict(data)
    for name, kind in kinds.items():
        if data[name] is not None:
            found[name] = kind(**{key: _value(value) for key, value in data[name].items()})
    for name in ("rank_layers", "random_layers"):
        found[name] = tuple(_value(value) for value in data[name])
    return EpPoint(**found)


def _value(stored: Any) -> Any:
    """A number or an interval; null is nan."""
    if isinstance(stored, list):
        return tuple(_value(item) for item in stored)
    return nan if stored is None else stored
