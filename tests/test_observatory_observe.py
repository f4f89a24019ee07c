"""Observing: a planted routing comes back exactly, in figures and in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import metrics
from dodoco_ext.errors import DodocoError, InputError, NothingToObserve
from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import ConditionBuilder, Shape
from dodoco_ext.observatory.findings import findings
from dodoco_ext.observatory.result import Result
from observatory_cases import (
    EXPERTS,
    TEXT,
    VOCABULARY,
    ByteTokenizer,
    PlantedModel,
    even_table,
    lopsided_table,
)

SHAPE = Shape(batch_size=4, sequence_length=32, num_batches=6)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return ["mock-uniform", "mock-unigram", "mock-repeat", f"shuffled:{path}", str(path)]


def run(model: torch.nn.Module, sources: list[str], seed: int = 0, shape: Shape = SHAPE) -> Result:
    return observe.run(model, ByteTokenizer(), sources, name="planted", shape=shape, seed=seed)[0]


@pytest.mark.parametrize("first_position", [True, False])
def test_every_figure_is_that_of_the_planted_routing(
    first_position: bool, sources: list[str]
) -> None:
    table = lopsided_table()
    shape = replace(SHAPE, first_position=first_position)
    result = run(PlantedModel(table), sources, shape=shape)
    assert result.first_position is first_position
    skipped = 0 if first_position else 1
    num_tokens = SHAPE.num_tokens - skipped * SHAPE.num_sequences
    fed = ConditionBuilder(ByteTokenizer(), SHAPE, 0).build(sources)
    for condition, found in zip(fed, result.conditions, strict=True):
        experts = table[condition.ids[:, skipped:]].reshape(SHAPE.num_batches, -1)
        per_pass = np.stack([np.bincount(row, minlength=EXPERTS) for row in experts])
        for index, layer in enumerate(found.layers):
            assert layer.counts == per_pass.sum(axis=0).tolist()
            assert layer.tokens == num_tokens
            assert layer.assignments == 2 * num_tokens
            assert layer.passes == SHAPE.num_batches
            np.testing.assert_allclose(
                [row[index] for row in found.pass_gini], metrics.gini(per_pass), rtol=1e-12
            )
            assert layer.gini == pytest.approx(np.mean(metrics.gini(per_pass)))
            assert layer.window_gini == pytest.approx(metrics.gini(per_pass.sum(axis=0)))
            assert layer.max_over_mean == pytest.approx(np.mean(metrics.max_over_mean(per_pass)))
            assert layer.unused_experts == metrics.unused_experts(per_pass.sum(axis=0))
        assert found.loss == pytest.approx(np.log(VOCABULARY))


def test_the_same_seed_gives_the_same_numbers(sources: list[str]) -> None:
    first, second = (run(PlantedModel(even_table()), sources) for _ in range(2))
    assert first.conditions == second.conditions
    assert first.ratios == second.ratios
    assert first.conditions != run(PlantedModel(even_table()), sources, seed=1).conditions


def test_the_finding_follows_the_routing(sources: list[str]) -> None:
    even = findings(run(PlantedModel(even_table()), sources))
    lopsided = findings(run(PlantedModel(lopsided_table()), sources))
    assert even[0].startswith("The uniform mock underestimates the routing imbalance of fox.txt")
    assert lopsided[0].startswith("The uniform mock overestimates the routing imbalance of fox.txt")


def test_a_router_that_ignores_order_makes_unigram_mock_and_shuffled_text_alike(
    sources: list[str],
) -> None:
    result = run(PlantedModel(even_table()), sources)
    counts = {c.name: [layer.counts for layer in c.layers] for c in result.conditions}
    assert counts["unigram mock"] == counts["shuffled fox.txt"] == counts["fox.txt"]


def test_the_model_is_left_as_it_was(sources: list[str]) -> None:
    model = PlantedModel(even_table()).train()
    run(model, sources)
    assert model.training
    assert not any(model.modes), "it is observed in evaluation mode"
    assert not any(module._forward_hooks for module in model.modules())


def test_the_recording_outlives_the_observation(sources: list[str]) -> None:
    model = PlantedModel(even_table())
    _, path = observe.run(model, ByteTokenizer(), sources, name="planted", shape=SHAPE)
    reader = dodoco.open(path)
    assert reader.state == "closed"
    layer = reader.snapshot().layers[0]
    assert layer.tokens == len(sources) * SHAPE.num_tokens


def test_a_dense_model_is_refused(sources: list[str]) -> None:
    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCABULARY, 4)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    with pytest.raises(NothingToObserve, match="no MoE router in Dense") as caught:
        run(Dense(), sources)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(sources: list[str]) -> None:
    model = PlantedModel(even_table()[:300])
    with pytest.raises(
        InputError, match=r"vocabulary mismatch.*ids up to 511, the model embeds 300"
    ):
        run(model, sources)


def test_provenance_names_no_machine() -> None:
    facts = observe.provenance()
    assert {"dodoco-ext", "python", "torch", "numpy", "machine"} <= set(facts)
    assert not any("/" in value for value in facts.values())
    assert facts["machine"].endswith("CPU cores")


class ByLength(PlantedModel):
    """Routes a token otherwise where it stands alone."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        alone = input_ids.shape[1] == 1
        return super().forward(torch.full_like(input_ids, 3) if alone else input_ids, use_cache)


def test_a_model_whose_first_tokens_depend_on_the_others_is_not_taken_apart() -> None:
    shape = replace(SHAPE, first_position=False)
    with pytest.raises(DodocoError, match="leave out --without-first"):
        run(ByLength(lopsided_table()), ["mock-repeat"], shape=shape)
