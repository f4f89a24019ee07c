"""The paper's five checkpoints as shapes: what a recording of each would hold."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import dodoco_ext as dodoco
from dodoco_ext.errors import InputError
from dodoco_ext.observatory.zoo.real import CHECKPOINTS, meta_model

# MoE layers, experts, experts a token: the table of the paper.
PAPER = {
    "mha": (27, 64, 6),
    "mla": (26, 64, 6),
    "gqa": (48, 128, 8),
    "mamba2": (23, 128, 6),
    "gdn": (40, 256, 8),
}


def test_the_five_checkpoints_of_the_paper() -> None:
    assert {
        name: (c.num_moe_layers, c.num_experts, c.top_k) for name, c in CHECKPOINTS.items()
    } == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_attach_finds_every_layer_and_expert_on_the_meta_device(name: str) -> None:
    model = meta_model(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with dodoco.attach(model) as attachment:
        shapes = [(layer.num_experts, layer.top_k) for layer in attachment.layers]
        uncovered = attachment.uncovered
    num_layers, num_experts, top_k = PAPER[name]
    assert shapes == [(num_experts, top_k)] * num_layers
    assert uncovered == ()


@pytest.mark.parametrize("name", PAPER)
def test_the_shape_has_as_many_parameters_as_published(name: str) -> None:
    parameters = sum(p.numel() for p in meta_model(name).parameters())
    assert parameters / 1e9 == pytest.approx(CHECKPOINTS[name].billions, abs=0.05)


def test_an_unknown_checkpoint_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InputError, match=r"no checkpoint 'gpt'.*give one of mha, mla"):
        meta_model("gpt")
