"""The bands: the published figures give the published bands, and what an assignment hangs on is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.bands import (
    BANDS,
    PUBLISHED,
    SCALES,
    Evidence,
    Thresholds,
    assign_bands,
    band_of,
    band_sentences,
    band_within,
)
from dodoco_ext.observatory.published import MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.mixer)
def test_published_figures_give_published_bands(model) -> None:
    assert band_within(model.lowest) == model.band


def test_what_is_published_leaves_the_thresholds_no_room_that_is_not_shown() -> None:
    """Each threshold may move only towards the band without figures."""
    for thresholds in (Thresholds(0.14, 0.24), Thresholds(0.15, 0.25)):
        wrong = [
            m.mixer for m in MODELS if m.stated and band_within(m.lowest, thresholds) != m.band
        ]
        assert wrong
    inner = Thresholds(0.19, 0.2)
    assert all(band_within(m.lowest, inner) == m.band for m in MODELS if m.stated)
    assert [m.mixer for m in MODELS if not m.stated] == ["GQA"]


def test_edges_belong_to_the_lower_band() -> None:
    assert band_of(0.150) == "data-resilient"
    assert band_of(0.1501) == "intermediate"
    assert band_of(0.24) == "intermediate"
    assert band_of(0.2401) == "persistently concentrated"


@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_a_higher_gini_is_never_in_a_lower_band(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert BANDS.index(band_of(low)) <= BANDS.index(band_of(high))


def test_bounds_that_allow_two_bands_give_none() -> None:
    assert band_within((0.1, 0.2)) is None
    assert band_within((0.2, 0.3)) is None
    assert band_within((0.2, 0.2)) == "intermediate"


def evidence(**gini: float) -> dict[str, Evidence]:
    return {name: Evidence(value, (value - 0.01, value + 0.01)) for name, value in gini.items()}


def test_the_lowest_real_text_decides() -> None:
    [found] = assign_bands({"m": evidence(english=0.3, code=0.1)})
    assert (found.band, found.condition, found.lowest) == ("data-resilient", "code", 0.1)
    assert found.without == {"english": "data-resilient", "code": "persistently concentrated"}
    assert not found.firm
    assert "it hangs on code" in band_sentences([found])[1]


def test_shares_say_how_near_a_threshold_is() -> None:
    sure, close = assign_bands(
        {"sure": evidence(english=0.05), "close": evidence(english=0.1501)}, seed=3
    )
    assert sure.shares == (1.0, 0.0, 0.0)
    assert sure.firm
    assert close.shares[0] == pytest.approx(0.5, abs=0.03)
    assert sum(close.shares) == pytest.approx(1.0)
    assert not close.firm
    assert close.margin == pytest.approx(0.0001)


def test_moving_the_edges_moves_who_is_near_them() -> None:
    [found] = assign_bands({"m": evidence(english=0.16)})
    by_scale = dict(zip(SCALES, found.scaled, strict=True))
    assert by_scale[1.0] == found.band == "intermediate"
    assert by_scale[1.1] == "data-resilient"
    assert by_scale[0.7] == "intermediate"
    assert "moved by 1.1, 1.2, 1.3" in band_sentences([found])[1]


def test_sentences_name_every_model_once_in_its_band() -> None:
    found = assign_bands(
        {"low": evidence(a=0.01), "mid": evidence(a=0.2), "high": evidence(a=0.9), "mute": {}}
    )
    first = band_sentences(found)[0]
    assert "low data-resilient; mid intermediate; high persistently concentrated." in first
    assert band_sentences([]) == []


def test_same_seed_same_shares() -> None:
    given_ = {"m": evidence(a=0.151, b=0.16)}
    assert assign_bands(given_, seed=5) == assign_bands(given_, seed=5)


@pytest.mark.parametrize("edges", [(0.0, 0.2), (0.2, 0.2), (0.3, 0.2), (0.2, 1.0)])
def test_bad_thresholds_are_refused(edges: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="0 < lower < upper < 1"):
        Thresholds(*edges)
    with pytest.raises(InputError, match="lies in"):
        band_of(1.5)
    assert Thresholds(0.150, 0.24) == PUBLISHED
