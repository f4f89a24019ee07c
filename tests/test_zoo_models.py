"""The models that ship: their cards are true, they beat a bigram, their routers work, and the demo runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import comparison, demo
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.corpus import Corpus, builtin_corpora
from dodoco_ext.observatory.models import load_model
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo import shipped
from dodoco_ext.observatory.zoo.__main__ import main
from dodoco_ext.observatory.zoo.baselines import Baselines
from dodoco_ext.observatory.zoo.card import CARD, Card, balance_of, held_out_losses, sha256_of_file
from dodoco_ext.observatory.zoo.species import NUM_EXPERTS, NUM_MOE_LAYERS, SPECIES, TOP_K
from dodoco_ext.observatory.zoo.text import Data, prepare
from observatory_cases import a_result

TEXTS = ("prose", "code")
"""Texts that need no download; on another Python they are others than those of the cards."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return {name: builtin_corpora()[name] for name in TEXTS}


@pytest.fixture(scope="module")
def data(corpora: dict[str, Corpus]) -> Data:
    tokenizer: Any = load_model("zoo:gqa").tokenizer
    return prepare(corpora, tokenizer, 128)


def test_weights_are_small_enough_to_ship() -> None:
    sizes = {
        name: (shipped.model_folder(name) / "model.safetensors").stat().st_size for name in SPECIES
    }
    assert max(sizes.values()) <= 3_000_000, sizes
    assert sum(sizes.values()) <= 12_000_000, sizes


def test_models_differ_in_their_mixer_and_balancing_only() -> None:
    cards = shipped.cards()
    assert list(cards) == ["mla", "mha", "gqa", "mamba2", "gdn"]
    same = {
        (
            c.num_steps,
            c.num_tokens,
            c.batch_size,
            c.sequence_length,
            c.data_sha256,
            c.tokenizer_sha256,
        )
        for c in cards.values()
    }
    assert len(same) == 1
    sizes = {(c.num_moe_layers, c.num_experts, c.top_k) for c in cards.values()}
    assert sizes == {(NUM_MOE_LAYERS, NUM_EXPERTS, TOP_K)}
    assert {c.balancing for c in cards.values()} == {
        kind.balancing.description for kind in SPECIES.values()
    }


@pytest.mark.parametrize("name", SPECIES)
def test_a_card_belongs_to_its_files_and_states_a_margin_that_its_losses_keep(name: str) -> None:
    folder = shipped.model_folder(name)
    card = Card.read(folder)
    assert card.name == name
    assert card.weights_sha256 == sha256_of_file(folder / "model.safetensors")
    assert card.tokenizer_sha256 == sha256_of_file(shipped.tokenizer_folder() / "tokenizer.json")
    assert card.margin > 0.5
    assert card.mean.loss + card.retrain_interval + card.margin <= card.mean.bigram + 0.005
    assert card.mean.bigram < card.mean.unigram
    assert card.last_loss < card.first_loss - 1
    assert len(card.packages) == 2
    assert all(len(digest) == 64 for digest in card.packages.values())


@pytest.mark.parametrize("name", SPECIES)
def test_a_model_beats_the_bigram_by_the_margin_of_its_card_and_its_router_is_not_collapsed(
    name: str, data: Data, corpora: dict[str, Corpus]
) -> None:
    loaded = load_model(f"zoo:{name}")
    card = Card.read(shipped.model_folder(name))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in loaded.model.parameters()) == card.num_parameters
    baselines = Baselines(list(data.train.values()), len(loaded.tokenizer))
    found = held_out_losses(loaded.model, data, baselines)
    mean = {f: np.mean([getattr(t, f) for t in found.values()]) for f in ("loss", "bigram")}
    assert mean["loss"] <= mean["bigram"] - card.margin
    for text, corpus in corpora.items():
        if corpus.sha256 == card.texts[text]["sha256"]:
            assert found[text].loss == pytest.approx(card.held_out[text].loss, abs=0.005)
    for layer in balance_of(loaded.model, data):
        assert layer.entropy > 0.9, "log k / log E = 0.33 is collapse"
        assert layer.unused <= NUM_EXPERTS // 16


def test_the_documented_figures_are_those_of_the_cards() -> None:
    lines = CliRunner().invoke(main, ["--cards"]).output.splitlines()
    assert len(lines) == 2 + len(SPECIES)
    text = (Path(__file__).parents[1] / "docs" / "zoo.md").read_text()
    assert [line for line in lines if line not in text] == []


def test_training_what_the_zoo_does_not_have_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--only", "moa", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == (
        "error: no model 'moa' in the zoo: give one of mla, mha, gqa, mamba2, gdn\n"
    )


def test_a_card_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text('{"name": "x"}')
    with pytest.raises(InputError, match="is not a card of the zoo") as caught:
        Card.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_demo_observes_the_zoo_under_exactly_six_conditions(tmp_path: Path) -> None:
    shape = Shape(batch_size=2, sequence_length=32, num_batches=3)
    phases: list[str] = []
    found = demo.run_demo(
        shape=shape,
        names=("mha", "gqa"),
        progress=lambda phase, done, total: phases.append(phase),
    )
    assert list(found) == ["mha", "gqa"]
    for name, observed in found.items():
        result = observed.result
        kinds = [c.kind for c in result.conditions]
        assert kinds == ["mock", "mock", "mock", "control", "real", "real"]
        assert {c.num_tokens for c in result.conditions} == {192}
        assert [len(c.layers) for c in result.conditions] == [NUM_MOE_LAYERS] * 6
        assert result.uncovered == []
        assert result.model.name == f"zoo:{name}"
        assert result.model.training is not None
        assert f"{name}: prose" in phases
    ids = [[c.sha256 for c in observed.result.conditions] for observed in found.values()]
    assert ids[0] == ids[1], "all models are fed the same ids"


def test_the_demo_takes_every_model_of_the_zoo_unless_told_otherwise() -> None:
    assert demo.run_demo.__kwdefaults__["names"] == tuple(SPECIES)


def test_a_comparison_says_what_its_numbers_say(tmp_path: Path) -> None:
    def result(mock: float, real: float) -> Any:
        gini = {"uniform mock": [mock] * 4, "prose": [real] * 4}
        return a_result(gini, {"uniform mock": "mock", "prose": "real"})

    results = {"one": result(0.4, 0.2), "two": result(0.2, 0.4), "three": result(0.3, 0.3)}
    first, second, last = comparison.sentences(results)
    assert "overestimated in 1 (one); underestimated in 1 (two); neither in 1 (three)" in first
    assert "the most even router is that of one" in second
    assert "least even that of two" in second
    assert "does not follow" in last
    page, numbers = comparison.write_comparison(results, tmp_path)
    html = page.read_text()
    assert html.count("<tr>") == 4
    assert 'href="two/report.html"' in html
    assert list(json.loads(numbers.read_text())) == ["one", "two", "three"]
