"""Conditions: equal tokens, and each of them is what its name promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import conditions
from dodoco_ext.observatory.conditions import (
    GRID,
    Condition,
    ConditionBuilder,
    Ids,
    Shape,
    Subject,
)
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


ROWS = VOCABULARY + 40
SUBJECT = Subject(ROWS, lambda prompts, number, seed: countdown(prompts, number, seed))


def countdown(prompts: Ids, number: int, seed: int) -> Ids:
    """Stands in for a model that draws: each prompt's last token plus the seed, counted up."""
    steps = prompts[:, -1:] + seed + np.arange(1, number + 1)
    return np.concatenate([prompts, steps % VOCABULARY], axis=1)


def built(
    source: str, shape: Shape = SHAPE, tokenizer: ByteTokenizer | None = None
) -> tuple[Condition, ConditionBuilder]:
    builder = ConditionBuilder(tokenizer or ByteTokenizer(), shape, 0, SUBJECT)
    return builder.build([source])[0], builder


def test_the_default_grid_has_six_conditions_of_every_kind_and_the_papers_among_them() -> None:
    assert len(GRID) == len(set(GRID)) == 6
    assert {"mock-uniform", "packaged:english", "packaged:dialogue", "packaged:bulgarian"} < set(
        GRID
    )


def test_the_whole_embedding_is_drawn_from_where_asked_for() -> None:
    shape = Shape(64, 128, 8)
    counts = np.bincount(built("mock-uniform:embedding", shape)[0].ids.ravel(), minlength=ROWS)
    assert len(counts) == ROWS
    assert counts[END] > 0, "special tokens have rows too"
    expected = shape.num_tokens / ROWS
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (ROWS - 1)) < 5 * np.sqrt(2 * (ROWS - 1))


def test_a_named_token_is_repeated() -> None:
    assert np.unique(built("mock-repeat:7")[0].ids).tolist() == [7]


def test_generated_text_begins_with_the_text_and_goes_on_as_the_model_says(text: str) -> None:
    condition, builder = built(f"generated:{text}")
    assert condition.kind == "control"
    prompts = builder.windows(text)[:, :8]
    np.testing.assert_array_equal(condition.ids[:, :8], prompts)
    steps = np.diff(condition.ids[:, 8:], axis=1) % VOCABULARY
    assert (steps == 1).all(), "every token after the prompt is the model's"
    assert built(f"generated:{text}")[0].sha256 == condition.sha256


def test_bos_and_padding_take_the_places_they_are_said_to(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.bos_token_id, tokenizer.pad_token_id = 300, 301  # type: ignore[assignment]
    plain, _ = built(text, tokenizer=tokenizer)
    dressed, _ = built(text, Shape(4, 32, 6, bos=True, padding=5), tokenizer)
    assert (dressed.ids[:, 0] == 300).all()
    assert (dressed.ids[:, -5:] == 301).all()
    np.testing.assert_array_equal(dressed.ids[:, 1:-5], plain.ids[:, 1:-5])
    assert dressed.ids.shape == plain.ids.shape, "equal tokens with and without"


def test_real_text_holds_no_special_token_but_the_one_between_documents(text: str) -> None:
    ids = built(text)[0].ids
    assert (ids[ids != END] < 256).all()


def test_another_kind_can_be_registered_and_a_taken_name_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conditions, "KINDS", dict(conditions.KINDS))

    def ramp(builder: ConditionBuilder, argument: str) -> Condition:
        shape = builder.shape
        ids = np.arange(shape.num_tokens).reshape(shape.num_sequences, -1) % int(argument)
        return Condition("ramp", "mock", f"ramp:{argument}", "counting up", ids)

    conditions.register("ramp", ramp)
    assert np.unique(built("ramp:3")[0].ids).tolist() == [0, 1, 2]
    for name in ("ramp", "shuffled", "builtin", "a:b", ""):
        with pytest.raises(InputError, match="choose a free name"):
            conditions.register(name, ramp)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mock-uniform:all", "give mock-uniform or mock-uniform:embedding"),
        ("mock-repeat:x", "mock-repeat:x is no token"),
        ("mock-repeat:512", "ids go from 0 to 511"),
        ("generated:", "write generated:SOURCE"),
        ("packaged:klingon", "no packaged text 'klingon'"),
        ("turns:assistant", "write turns:ROLE:SOURCE"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        built(source)
    assert "\n" not in str(caught.value)


def test_what_a_model_is_needed_for_is_refused_without_one(text: str) -> None:
    for source in ("mock-uniform:embedding", f"generated:{text}"):
        with pytest.raises(InputError, match="needs the model"):
            build([source])


def test_padding_that_leaves_no_text_and_bos_without_a_token_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="padding=31: give 0 to 30"):
        Shape(4, 32, 6, padding=31)
    with pytest.raises(InputError, match="leave out --bos"):
        built(text, Shape(4, 32, 6, bos=True))
