"""The sentences of the finding flip when the numbers flip."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dodoco_ext import nulls
from dodoco_ext.observatory.conditions import Kind
from dodoco_ext.observatory.findings import findings, limits, verdict
from observatory_cases import a_result

KINDS: dict[str, Kind] = {
    "uniform mock": "mock",
    "shuffled prose": "control",
    "prose": "real",
    "code": "real",
}
TRAINING: dict[str, Any] = {
    "num_steps": 240,
    "num_tokens": 491_520,
    "unigram_loss": {"prose": 6.5, "code": 6.3},
}


def around(value: float, spread: float = 0.01) -> list[float]:
    return [value + spread * (n % 5 - 2) for n in range(16)]


def sentences(
    mock: float, prose: float, code: float = 0.3, shuffled: float = 0.3, **options: Any
) -> list[str]:
    gini = {
        "uniform mock": around(mock),
        "shuffled prose": around(shuffled),
        "prose": around(prose),
        "code": around(code),
    }
    return findings(a_result(gini, KINDS, **options))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.2, 1.4), "above"),
        ((0.6, 0.9), "below"),
        ((0.9, 1.1), "level"),
        ((1.001, 1.1), "level"),
        ((0.9, 0.999), "level"),
        ((math.nan, math.nan), "unknown"),
    ],
)
def test_verdict(interval: tuple[float, float], expected: str) -> None:
    assert verdict(interval) == expected


def test_overestimation_underestimation_and_neither() -> None:
    assert "uniform mock overestimates the routing imbalance of prose" in sentences(0.5, 0.3)[0]
    assert "uniform mock underestimates the routing imbalance of prose" in sentences(0.3, 0.5)[0]
    neither = sentences(0.3, 0.3)[0]
    assert "uniform mock neither over- nor underestimates the routing imbalance of prose" in neither


def test_the_numbers_of_the_first_sentence_are_those_of_the_result() -> None:
    first = sentences(0.5, 0.25)[0]
    mock, prose = (nulls.corrected_gini(around(value), 1024, 64, 4) for value in (0.5, 0.25))
    assert f"corrected Gini {mock:.3f} against {prose:.3f}, ratio {mock / prose:.2f}" in first
    assert "2 of 2 layers" in first
    assert "0 of 2 layers" in sentences(0.25, 0.5)[0]


def test_comparisons_are_counted() -> None:
    counted = "\n".join(sentences(0.4, prose=0.3, code=0.5))
    assert (
        "Of the 2 comparisons of a mock with a real text, 1 lie above 1, 1 below, and 0" in counted
    )


def test_uniformly_routed_text_has_no_ratio() -> None:
    text = "\n".join(sentences(0.5, prose=0.06, code=0.3))
    assert "routing of prose cannot be told from uniform routing" in text
    assert "Not to be told from uniform routing: prose." in text


def test_shuffling_matters_or_not() -> None:
    assert "account for the imbalance" in "\n".join(sentences(0.5, 0.3, shuffled=0.3))
    assert "overstate the imbalance" in "\n".join(sentences(0.5, 0.3, shuffled=0.4))
    assert "understate the imbalance" in "\n".join(sentences(0.5, 0.3, shuffled=0.2))


def test_real_texts_differ_or_not() -> None:
    assert "prose is routed more evenly than code" in "\n".join(sentences(0.5, 0.2, code=0.4))
    assert "code is routed more evenly than prose" in "\n".join(sentences(0.5, 0.4, code=0.2))
    assert "does not tell" in "\n".join(sentences(0.5, 0.3, code=0.3))


def test_learning_is_claimed_only_below_the_baseline() -> None:
    learned = "\n".join(sentences(0.5, 0.3, training=TRAINING, loss=5.0))
    assert "has learned from context: 5.00 nats a token on held-out prose, 1.50 below" in learned
    failed = "\n".join(sentences(0.5, 0.3, training=TRAINING, loss=7.0))
    assert "has learned nothing from context: 7.00 nats" in failed
    assert "learned" not in "\n".join(sentences(0.5, 0.3))


def test_limits_say_what_kind_of_model_it_was() -> None:
    gini = {name: around(0.3) for name in KINDS}
    tiny = limits(a_result(gini, KINDS, training=TRAINING))
    assert tiny[0].startswith(
        "The model is tiny: 3,000,000 parameters in 2 MoE layers, trained for 240"
    )
    large = limits(a_result(gini, KINDS, num_parameters=30_000_000_000))
    assert large[0].startswith("The model is one model among many")


def test_a_run_without_mocks_or_without_real_texts_still_has_a_finding() -> None:
    assert findings(a_result({"prose": around(0.3)}, KINDS))
    assert findings(a_result({"uniform mock": around(0.3)}, KINDS))
