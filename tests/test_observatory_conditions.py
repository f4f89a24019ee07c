"""Conditions: equal tokens, and each of them is what its name promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.conditions import Condition, ConditionBuilder, Shape
from observatory_cases import END, TEXT, VOCABULARY, ByteTokenizer

SHAPE = Shape(batch_size=4, sequence_length=32, num_batches=6)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return str(path)


def build(sources: list[str], seed: int = 0, shape: Shape = SHAPE) -> dict[str, Condition]:
    conditions = ConditionBuilder(ByteTokenizer(), shape, seed).build(sources)
    return {condition.name: condition for condition in conditions}


def sources(text: str) -> list[str]:
    return ["mock-uniform", "mock-unigram", "mock-repeat", f"shuffled:{text}", text]


def test_all_conditions_have_equal_tokens(text: str) -> None:
    conditions = build(sources(text))
    assert list(conditions) == [
        "uniform mock",
        "unigram mock",
        "repeated token",
        "shuffled fox.txt",
        "fox.txt",
    ]
    assert {c.ids.shape for c in conditions.values()} == {(24, 32)}
    assert {c.ids.dtype for c in conditions.values()} == {np.dtype(np.int64)}
    assert [c.kind for c in conditions.values()] == ["mock", "mock", "mock", "control", "real"]


def test_real_sequences_are_distinct_windows_of_the_text(text: str) -> None:
    ids = np.array([*TEXT.encode(), END])
    windows = {tuple(ids[i : i + 32]) for i in range(0, len(ids) - 31, 32)}
    sequences = [tuple(row) for row in build([text])["fox.txt"].ids]
    assert set(sequences) <= windows
    assert len(set(sequences)) == len(sequences)


def test_uniform_ids_are_valid_and_uniform(text: str) -> None:
    ids = build(["mock-uniform"], shape=Shape(64, 128, 8))["uniform mock"].ids
    counts = np.bincount(ids.ravel(), minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    assert counts[END] == 0, "special tokens are not text"
    expected = ids.size / (VOCABULARY - 1)
    chi_square = ((np.delete(counts, END) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 510) < 5 * np.sqrt(2 * 510)


def test_unigram_mock_has_exactly_the_counts_of_its_text(text: str) -> None:
    conditions = build(sources(text))
    mock, real = conditions["unigram mock"].ids, conditions["fox.txt"].ids
    np.testing.assert_array_equal(np.bincount(mock.ravel()), np.bincount(real.ravel()))
    per_sequence = [np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(mock, real, strict=True)]
    assert not all(per_sequence), "tokens are dealt over all sequences"


def test_shuffled_text_keeps_the_multiset_of_each_sequence(text: str) -> None:
    conditions = build(sources(text))
    shuffled, real = conditions["shuffled fox.txt"].ids, conditions["fox.txt"].ids
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(real, axis=1))
    assert (shuffled != real).mean() > 0.5


def test_repeated_token_is_one_token(text: str) -> None:
    assert np.unique(build(["mock-repeat"])["repeated token"].ids).tolist() == [END]


def test_the_seed_decides_everything(text: str) -> None:
    first, second, other = build(sources(text)), build(sources(text)), build(sources(text), seed=1)
    for name in first:
        assert first[name].sha256 == second[name].sha256
    assert first["fox.txt"].sha256 != other["fox.txt"].sha256


def test_adding_a_condition_leaves_the_others_as_they_were(text: str) -> None:
    assert build([text])["fox.txt"].sha256 == build(sources(text))["fox.txt"].sha256


def test_names_carry_no_folders(text: str) -> None:
    for condition in build(sources(text)).values():
        assert "/" not in condition.name + condition.source + condition.description


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no data given"),
        (["mock-gaussian"], "unknown mock 'mock-gaussian'"),
        (["shuffled:"], "write shuffled:SOURCE"),
        (["mock-repeat", "mock-repeat"], "given twice"),
        (["missing.txt"], "no such data: 'missing.txt'"),
    ],
)
def test_bad_sources_are_refused_in_one_line(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(given)
    assert "\n" not in str(caught.value)


def test_a_short_text_says_how_many_passes_it_allows(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * (32 * 4 * 3))
    with pytest.raises(InputError, match=r"gives 385 tokens, and 768 are needed.*--num-batches 3"):
        build([str(path)])


@pytest.mark.parametrize("shape", [{"batch_size": 0}, {"sequence_length": 1}, {"num_batches": 1}])
def test_shapes_without_an_interval_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(shape))}="):
        Shape(**{"batch_size": 1, "sequence_length": 8, "num_batches": 2, **shape})
