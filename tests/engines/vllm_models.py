"""Small random checkpoints of the shapes that vLLM serves; sizes that its CPU kernels have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dodoco_ext.observatory.models import quiet
from dodoco_ext.observatory.zoo import shipped

LAYERS, EXPERTS, TOP_K = 3, 8, 2

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # greedy choices far from alike
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Shape:
    """A family's configuration.

    Attributes:
        moe_layers: How many of its layers route.
    """

    model_type: str
    config: dict[str, Any]
    moe_layers: int = LAYERS


SHAPES = {
    "qwen3_moe": Shape(
        "qwen3_moe",
        {
            "num_hidden_layers": LAYERS,
            "head_dim": 32,
            "num_experts": EXPERTS,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Shape(
        "mixtral",
        {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, "hidden_size": 128},
    ),
    "deepseek_v2": Shape(
        "deepseek_v2",
        {
            "num_hidden_layers": LAYERS + 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
        },
    ),
    "gpt_oss": Shape(
        "gpt_oss",
        {
            "num_hidden_layers": LAYERS,
            "num_local_experts": EXPERTS,
            "head_dim": 64,
            "layer_types": ["full_attention"] * LAYERS,
        },
    ),
}


def build(name: str, folder: Path) -> Path:
    """Saves the checkpoint of a shape with the shipped tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = SHAPES[name]
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(shape.model_type, **{**_COMMON, **shape.config})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(shipped.tokenizer_folder()).save_pretrained(folder)
    return folder
