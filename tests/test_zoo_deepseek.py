"""DeepSeek-MoE: the published names of weights, the arithmetic, and the Auto classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from safetensors import safe_open
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import dodoco_ext as dodoco
from dodoco_ext.observatory.zoo import deepseek

deepseek.register()

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "bos_token_id": None,
    "eos_token_id": 0,
}
IDS = torch.arange(2 * 11).reshape(2, 11) * 5 % 96


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = deepseek.DeepseekConfig(**{**SMALL, **changes})
    return deepseek.DeepseekForCausalLM(config).eval()


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def test_weights_are_stored_under_the_published_names_and_load_through_the_auto_classes(
    tmp_path: Path,
) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    # Foreign code must neither be asked for nor run: the checkpoint's own configuration names some.
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mlp = {f"{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    expected = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(3):
        place = f"model.layers.{layer}"
        expected |= {f"{place}.self_attn.{p}_proj.weight" for p in "qkvo"}
        expected |= {f"{place}.{p}_layernorm.weight" for p in ("input", "post_attention")}
        if layer == 0:
            expected |= {f"{place}.mlp.{part}" for part in mlp}
            continue
        expected.add(f"{place}.mlp.gate.weight")
        expected |= {f"{place}.mlp.shared_experts.{part}" for part in mlp}
        expected |= {f"{place}.mlp.experts.{e}.{part}" for e in range(8) for part in mlp}
    assert stored_names(tmp_path) == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is deepseek.DeepseekForCausalLM
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_mixture_is_the_weighted_sum_of_its_experts_plus_the_shared_ones() -> None:
    block = small().model.layers[1].mlp
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        weights, ids = functional.linear(hidden[0], block.gate.weight).softmax(-1).topk(3)
        expected = block.shared_experts(hidden)[0]
        for token in range(5):
            for weight, expert in zip(weights[token], ids[token], strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ hidden[0, token]).chunk(2)
                product = functional.silu(gate) * up
                expected[token] += weight * (block.experts.down_proj[expert] @ product)
        torch.testing.assert_close(block(hidden)[0], expected)


def test_normalised_weights_sum_to_one_only_where_asked_for() -> None:
    for normalise in (False, True):
        gate = small(norm_topk_prob=normalise).model.layers[1].mlp.gate
        sums = gate(torch.randn(6, 32))[1].sum(-1)
        assert bool((sums > 0.999).all()) is normalise


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [({}, [1, 2]), ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, [0, 2])],
)
def test_which_layers_are_mixtures(changes: dict[str, int], moe_layers: list[int]) -> None:
    model = small(**changes, n_shared_experts=None)
    found = [
        n
        for n, layer in enumerate(model.model.layers)
        if isinstance(layer.mlp, deepseek.DeepseekMoE)
    ]
    assert found == moe_layers
    assert model(input_ids=IDS).logits.shape == (2, 11, 96)


def test_counts_equal_those_of_an_independent_hook_and_generation_with_a_cache_agrees() -> None:
    model = small()
    counts = np.zeros((2, 8), np.int64)
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, _i, output, row=row: np.add.at(counts[row], output[2].numpy().ravel(), 1)
        )
        for row, layer in enumerate(model.model.layers[1:])
    ]
    with dodoco.attach(model) as attachment:
        generated = model.generate(
            IDS[:1], attention_mask=torch.ones(1, 11), max_new_tokens=4, do_sample=False
        )
        recorded = [layer.counts.tolist() for layer in attachment.snapshot().layers]
    assert recorded == counts.tolist()
    for handle in handles:
        handle.remove()
    ids = IDS[:1]
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    output = small()(input_ids=IDS, labels=IDS)
    expected = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
    ],
)
def test_configurations_of_other_architectures_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):  # `strict` wraps what a check raises
        deepseek.DeepseekConfig(**{**SMALL, **changes})


def test_registering_twice_changes_nothing() -> None:
    deepseek.register()
    assert type(AutoConfig.for_model("deepseek")) is deepseek.DeepseekConfig
