"""The demo's model, trained for a few steps: reproducible, kept, and reused only when it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dodoco_ext.observatory import demo, observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.corpus import Corpus, Document
from dodoco_ext.observatory.tiny import TinyConfig, TinyModel, balance_loss, train_or_reuse

pytest.importorskip("transformers")

CONFIG = TinyConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_experts=8,
    top_k=2,
    expert_size=16,
    batch_size=2,
    sequence_length=16,
    num_steps=3,
)


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    def corpus(name: str, word: str) -> Corpus:
        documents = [Document(f"{name}:{n}", f"{word} {n} and more words\n" * 40) for n in range(6)]
        return Corpus(name, tuple(documents[:4]), tuple(documents[4:]))

    return {"prose": corpus("prose", "sentence"), "code": corpus("code", "x = f(y)")}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, corpora: dict[str, Corpus]
) -> tuple[Path, TinyModel]:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return folder, train_or_reuse(folder, corpora, CONFIG, seed=0)


def weights(model: TinyModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(a: TinyModel, b: TinyModel) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_a_fitting_model_is_reused(
    trained: tuple[Path, TinyModel], corpora: dict[str, Corpus]
) -> None:
    folder, model = trained
    again = train_or_reuse(folder, corpora, CONFIG, seed=0)
    assert not model.reused
    assert again.reused
    assert again.training == model.training
    assert same(again, model)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_training_is_reproducible(
    trained: tuple[Path, TinyModel], corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    again = train_or_reuse(tmp_path / "model", corpora, CONFIG, seed=0)
    assert not again.reused
    assert same(again, trained[1])


def test_another_seed_configuration_or_text_is_trained_anew(
    trained: tuple[Path, TinyModel], corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    key = trained[1].training.key
    longer = replace(CONFIG, num_steps=1)
    shorter = {**corpora, "code": replace(corpora["code"], train=corpora["code"].train[:2])}
    keys = [
        train_or_reuse(tmp_path / "a", corpora, longer, seed=0).training.key,
        train_or_reuse(tmp_path / "b", corpora, longer, seed=1).training.key,
        train_or_reuse(tmp_path / "c", shorter, longer, seed=0).training.key,
    ]
    assert len({key, *keys}) == 4


def test_retrain_forces_training(
    trained: tuple[Path, TinyModel], corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    for retrain in (False, True):
        train_or_reuse(
            tmp_path / "model",
            corpora,
            CONFIG,
            0,
            retrain=retrain,
            progress=lambda done, total: steps.append((done, total)),
        )
    assert steps == [(1, 3), (2, 3), (3, 3)] * 2


def test_an_unfinished_save_is_trained_anew(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "training.json").write_text("{")
    assert not train_or_reuse(folder, corpora, CONFIG, seed=0).reused


def test_training_leaves_the_random_state_alone(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_or_reuse(tmp_path / "model", corpora, CONFIG, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_balance_loss_is_one_when_balanced_and_e_over_k_when_collapsed() -> None:
    balanced = torch.eye(8).repeat(4, 1) * 1e-4
    assert balance_loss(balanced, top_k=1).item() == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.zeros(32, 8)
    collapsed[:, :2] = 50.0
    assert balance_loss(collapsed, top_k=2).item() == pytest.approx(4.0)


def test_the_demo_observes_exactly_six_conditions_and_says_whether_it_reused(
    corpora: dict[str, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "builtin_corpora", lambda: corpora)
    shape = Shape(batch_size=2, sequence_length=16, num_batches=3)
    first, second = (
        demo.run_demo(tmp_path, config=CONFIG, shape=shape, seed=3)[0] for _ in range(2)
    )
    assert [c.kind for c in first.conditions] == ["mock", "mock", "mock", "control", "real", "real"]
    assert {c.num_tokens for c in first.conditions} == {96}
    assert (first.model.reused, second.model.reused) == (False, True)
    assert first.conditions == second.conditions, "a reused model gives the very same numbers"
    assert first.ratios == second.ratios


def test_counts_equal_those_of_an_independent_hook(
    trained: tuple[Path, TinyModel], tmp_path: Path
) -> None:
    model, tokenizer = trained[1].model, trained[1].tokenizer
    path = tmp_path / "a.txt"
    path.write_text("sentence 1 and more words x = f(y)\n" * 60)
    counts = np.zeros((2, 8), dtype=np.int64)
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, row=row: np.add.at(
                counts[row], output[2].numpy().ravel(), 1
            )
        )
        for row, layer in enumerate(model.model.layers)
    ]
    shape = Shape(batch_size=2, sequence_length=16, num_batches=3)
    result, _ = observe.run(model, tokenizer, [str(path)], name="tiny", shape=shape)
    for handle in handles:
        handle.remove()
    assert [layer.counts for layer in result.conditions[0].layers] == counts.tolist()
