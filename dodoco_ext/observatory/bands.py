"""Which of three bands a model's routing falls into, by one rule, and how firmly.

The rule looks at the lowest Gini over the real texts. At or below the lower threshold some real text
spreads the load: *data-resilient*. Above the upper one every real text leaves it skewed: *persistently
concentrated*. Else *intermediate*. The thresholds are the edges of the published bands, and nothing finer can
be had from what was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import NormalDist
from typing import get_args

import numpy as np

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.published import Band
from dodoco_ext.observatory.result import Interval

BANDS: tuple[Band, ...] = get_args(Band)

SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Factors by which both thresholds are moved to see what moves along."""

_DRAWS = 10_000


@dataclass(frozen=True)
class Thresholds:
    """Edges of the bands, in Gini.

    Raises:
        InputError: Not 0 < resilient < concentrated < 1.
    """

    resilient: float = 0.150
    concentrated: float = 0.24

    def __post_init__(self) -> None:
        if not 0 < self.resilient < self.concentrated < 1:
            raise InputError(
                f"thresholds are {self.resilient} and {self.concentrated}; give 0 < lower < upper < 1"
            )

    def scaled(self, factor: float) -> Thresholds:
        """Both moved by a factor."""
        return Thresholds(self.resilient * factor, self.concentrated * factor)


PUBLISHED = Thresholds()


@dataclass(frozen=True)
class Evidence:
    """A model's Gini under one real condition, and its 95 % interval."""

    gini: float
    interval: Interval


@dataclass(frozen=True)
class BandResult:
    """One model's band.

    Attributes:
        model: Its name.
        band: By the thresholds used.
        lowest, lowest_interval: Lowest Gini over the real conditions, and its interval as that condition's.
        condition: Where it is lowest.
        shares: Of draws from the intervals, the share that falls into each of `BANDS`.
        scaled: Band where both thresholds are moved by each of `SCALES`.
        margin: Distance of `lowest` to the nearest threshold, in Gini.
        without: Band where one real condition is left out, by its name; of one condition, empty.
    """

    model: str
    band: Band
    lowest: float
    lowest_interval: Interval
    condition: str
    shares: tuple[float, float, float]
    scaled: tuple[Band, ...]
    margin: float
    without: dict[str, Band]

    @property
    def firm(self) -> bool:
        """In 95 % of draws the same, and the same whichever condition is left out."""
        return self.shares[BANDS.index(self.band)] >= 0.95 and {*self.without.values()} <= {
            self.band
        }


def band_of(lowest: float, thresholds: Thresholds = PUBLISHED) -> Band:
    """The rule.

    Raises:
        InputError: The Gini is not in [0, 1].
    """
    if not 0 <= lowest <= 1:
        raise InputError(f"lowest Gini is {lowest}; Gini lies in [0, 1]")
    if lowest <= thresholds.resilient:
        return "data-resilient"
    return "persistently concentrated" if lowest > thresholds.concentrated else "intermediate"


def band_within(bounds: tuple[float, float], thresholds: Thresholds = PUBLISHED) -> Band | None:
    """The band of a lowest Gini of which only this is known: above the first, at most the second.

    Returns:
        The band, or None where the bounds allow more than one.
    """
    low, high = bounds
    just_above = float(np.nextafter(low, 1.0)) if high > low else low
    at_low, at_high = band_of(just_above, thresholds), band_of(high, thresholds)
    return at_low if at_low == at_high else None


def assign_bands(
    evidence: Mapping[str, Mapping[str, Evidence]],
    thresholds: Thresholds = PUBLISHED,
    seed: int = 0,
) -> list[BandResult]:
    """Bands of several models, with what they hang on.

    Draws take each condition's Gini as normal with the width of its interval, conditions independent.

    Args:
        evidence: By model and real condition; a model without any is left out.
        thresholds: Edges of the bands.
        seed: Of the draws.

    Returns:
        One a model, in the order given.
    """
    return [
        _assign(model, of_model, thresholds, seed)
        for model, of_model in evidence.items()
        if of_model
    ]


def _assign(
    model: str, evidence: Mapping[str, Evidence], thresholds: Thresholds, seed: int
) -> BandResult:
    condition = min(evidence, key=lambda name: evidence[name].gini)
    lowest = evidence[condition].gini
    drawn = _draws([*evidence.values()], seed)
    edges = (thresholds.resilient, thresholds.concentrated)
    resilient, concentrated = float((drawn <= edges[0]).mean()), float((drawn > edges[1]).mean())
    return BandResult(
        model=model,
        band=band_of(lowest, thresholds),
        lowest=lowest,
        lowest_interval=evidence[condition].interval,
        condition=condition,
        shares=(resilient, max(1.0 - resilient - concentrated, 0.0), concentrated),
        scaled=tuple(band_of(lowest, thresholds.scaled(factor)) for factor in SCALES),
        margin=min(abs(lowest - edge) for edge in edges),
        without={
            left_out: band_of(
                min(e.gini for name, e in evidence.items() if name != left_out), thresholds
            )
            for left_out in (evidence if len(evidence) > 1 else ())
        },
    )


def _draws(evidence: Sequence[Evidence], seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Lowest Gini of each draw [_DRAWS]."""
    rng = np.random.default_rng(seed)
    width = 2 * NormalDist().inv_cdf(0.975)
    drawn = np.full(_DRAWS, np.inf)
    for one in evidence:
        low, high = one.interval
        deviation = (high - low) / width if isfinite(high - low) else 0.0
        drawn = np.minimum(drawn, rng.normal(one.gini, deviation, _DRAWS))
    return drawn


def band_sentences(results: Sequence[BandResult], thresholds: Thresholds = PUBLISHED) -> list[str]:
    """What the bands say, and how far they can be relied on."""
    if not results:
        return []
    parts = []
    for band in BANDS:
        names = [r.model for r in results if r.band == band]
        parts.append(f"{', '.join(names) if names else 'none'} {band}")
    said = [
        (
            f"By the lowest Gini over the real texts, with edges {thresholds.resilient:.3f} and "
            f"{thresholds.concentrated:.3f}: {'; '.join(parts)}."
        )
    ]
    for result in results:
        share = result.shares[BANDS.index(result.band)]
        moved = [f"{f:g}" for f, b in zip(SCALES, result.scaled, strict=True) if b != result.band]
        other = {name: band for name, band in result.without.items() if band != result.band}
        doubts = []
        if share < 0.95:
            doubts.append(f"only {share:.0%} of draws from its intervals agree")
        if other:
            doubts.append(
                "it hangs on "
                + ", ".join(f"{name} (without it: {band})" for name, band in other.items())
            )
        if moved:
            doubts.append(f"it changes where the edges are moved by {', '.join(moved)}")
        if doubts:
            said.append(
                f"{result.model}, {result.band} at {result.lowest:.3f} on {result.condition}: {'; '.join(doubts)}."
            )
    return said
