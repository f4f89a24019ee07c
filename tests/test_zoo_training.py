"""Training the zoo: twenty steps of each model lower its loss; balance, checkpoints and baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from dodoco_ext.observatory.corpus import Corpus, Document
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo import make
from dodoco_ext.observatory.zoo.balance import Balancer
from dodoco_ext.observatory.zoo.baselines import Baselines
from dodoco_ext.observatory.zoo.card import Card
from dodoco_ext.observatory.zoo.species import SPECIES, Balancing
from dodoco_ext.observatory.zoo.text import LEARNED, LOW_RESOURCE, Data
from dodoco_ext.observatory.zoo.training import CHECKPOINT, Plan, train

PLAN = Plan(num_steps=20, batch_size=4, sequence_length=32, checkpoint_every=5)
SHORT = replace(PLAN, num_steps=4, checkpoint_every=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def words(name: str, number: int) -> str:
    rng = np.random.default_rng([number, *name.encode()])
    nouns = np.array(["gate", "token", "expert", "layer", "queue", "rank", name])
    return " ".join(f"the {nouns[n]} sees" for n in rng.integers(0, 7, 300)) + ".\n"


@pytest.fixture(scope="module")
def material() -> make.Material:
    def corpus(name: str) -> Corpus:
        documents = [Document(f"{name}:{n}", words(name, n)) for n in range(8)]
        return Corpus(name, tuple(documents[:6]), tuple(documents[6:]))

    return make.prepare_material({n: corpus(n) for n in (*LEARNED, LOW_RESOURCE)}, PLAN)


@pytest.mark.parametrize("name", SPECIES)
def test_twenty_steps_lower_the_loss(name: str, material: make.Material) -> None:
    trained = train(SPECIES[name], material.data, PLAN, seed=0)
    assert len(trained.losses) == 20
    assert all(map(math.isfinite, trained.losses))
    assert np.mean(trained.losses[-5:]) < np.mean(trained.losses[:5]) - 0.3
    biases = [b for n, b in trained.model.named_buffers() if n.endswith("e_score_correction_bias")]
    rate = SPECIES[name].balancing.bias_rate
    assert len(biases) == (4 if rate else 0)
    for bias in biases:
        assert 0 < bias.abs().max() <= 20 * rate * 1.001


def test_a_zoo_is_written_with_cards_and_loads(material: make.Material, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (card,) = make.make_zoo([SPECIES["mha"]], material, SHORT, 0, tmp_path)
    folder = tmp_path / "mha"
    assert Card.read(folder) == card
    assert not (folder / CHECKPOINT).exists()
    assert card.num_tokens == 4 * 4 * 32
    assert set(card.held_out) == {*LEARNED, LOW_RESOURCE}
    assert card.mean.loss == pytest.approx(np.mean([card.held_out[n].loss for n in LEARNED]))
    assert [len(card.balance), card.dtype] == [4, "float16"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    for place in (folder, tmp_path / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.get_vocab() == material.tokenizer.get_vocab()


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    material: make.Material, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise Stopped

    kind = SPECIES["gqa"]
    whole = train(kind, material.data, SHORT, seed=5)
    with pytest.raises(Stopped):
        train(kind, material.data, SHORT, seed=5, folder=tmp_path, progress=stop)
    steps: list[int] = []
    again = train(
        kind,
        material.data,
        SHORT,
        seed=5,
        folder=tmp_path,
        progress=lambda done, total, loss: steps.append(done),
    )
    assert steps == [3, 4], "it went on from the checkpoint of step 2"
    assert again.losses == whole.losses
    left, right = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_of_another_training_is_not_taken_up(
    material: make.Material, tmp_path: Path
) -> None:
    train(SPECIES["gqa"], material.data, SHORT, seed=0, folder=tmp_path)
    steps: list[int] = []
    train(
        SPECIES["gqa"],
        material.data,
        SHORT,
        seed=1,
        folder=tmp_path,
        progress=lambda done, total, loss: steps.append(done),
    )
    assert steps == [1, 2, 3, 4]


def test_training_leaves_the_random_state_alone(material: make.Material) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(SPECIES["gqa"], material.data, replace(SHORT, num_steps=1), seed=0)
    assert torch.equal(torch.rand(3), expected)


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Module()
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(4))


def test_the_balance_loss_is_one_when_balanced_and_e_over_k_when_collapsed() -> None:
    balancer = Balancer(torch.nn.Module(), Balancing("batch", 0.01), top_k=1)
    assert balancer.loss((torch.eye(8).repeat(4, 1) * 1e-4,), 2).item() == pytest.approx(
        1, abs=1e-3
    )
    collapsed = torch.zeros(32, 8)
    collapsed[:, 0] = 50
    assert balancer.loss((collapsed,), 2).item() == pytest.approx(8)


def test_sequences_are_balanced_one_by_one_where_asked_for() -> None:
    # Each sequence uses one expert, the batch uses all: balanced as a batch, collapsed as sequences.
    logits = torch.eye(4).repeat_interleave(6, dim=0) * 50
    batch, sequence = (
        Balancer(torch.nn.Module(), Balancing(scope, 0.01), top_k=1).loss((logits,), 4).item()
        for scope in ("batch", "sequence")
    )
    assert batch == pytest.approx(1)
    assert sequence == pytest.approx(4)


def test_the_bias_falls_for_busy_experts_and_rises_for_idle_ones() -> None:
    model = Biased()
    balancer = Balancer(model, Balancing("sequence", 0.0, bias_rate=0.5), top_k=1)
    logits = torch.tensor([[3.0, 0, 0, 0]] * 4 + [[0, 3.0, 0, 0]] * 2 + [[0, 0, 3.0, 0]] * 2)
    balancer.loss((logits,), 1)
    balancer.update_biases()
    assert model.gate.e_score_correction_bias.tolist() == [-0.5, 0, 0, 0.5]
    # The bias now decides: expert 3 beats the others' scores.
    balancer.loss((torch.zeros(8, 4),), 1)
    balancer.update_biases()
    assert model.gate.e_score_correction_bias.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_baselines_are_the_frequencies_they_say() -> None:
    stream = np.array([0, 1, 0, 1, 0, 2])
    baselines = Baselines([stream], 4)
    np.testing.assert_allclose(baselines.unigram, np.array([4, 3, 2, 1]) / 10)
    np.testing.assert_allclose(baselines.bigram.sum(axis=1), 1)
    # After 0: token 1 twice, token 2 once; 0.75 of each is given to the unigram model.
    left_over = 0.75 * 2 / 3
    np.testing.assert_allclose(baselines.bigram[0, 1], (2 - 0.75) / 3 + left_over * 0.3)
    np.testing.assert_allclose(baselines.bigram[3], baselines.unigram)  # never seen
    unigram, bigram = baselines.losses(np.array([[0, 1, 0]]))
    assert unigram == pytest.approx(-(math.log(0.3) + math.log(0.4)) / 2)
    assert bigram == pytest.approx(
        -(math.log(baselines.bigram[0, 1]) + math.log(baselines.bigram[1, 0])) / 2
    )


def test_data_of_other_texts_has_another_digest() -> None:
    ids = np.arange(40)
    data = Data({"a": ids}, {"a": ids.reshape(4, 10)})
    assert data.sha256 == Data({"a": ids.copy()}, {"a": ids.reshape(4, 10)}).sha256
    assert data.sha256 != Data({"a": ids[::-1].copy()}, {"a": ids.reshape(4, 10)}).sha256
