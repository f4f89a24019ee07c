"""The five checkpoints of the paper: hub ids and shapes, written down from their published configurations.

The shapes make the models on torch's meta device, without a download and without memory, so that
what a recording of each would hold can be checked anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.zoo import deepseek

_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        hub_id: Its name on the hub.
        mixer: How its layers mix a sequence.
        model_type: As in its `config.json`.
        num_moe_layers, num_experts, top_k: What a recording of it holds.
        billions: Parameters, in thousand millions.
        config: The fields of its `config.json` that decide its shape.
    """

    hub_id: str
    mixer: str
    model_type: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    billions: float
    config: dict[str, Any] = field(repr=False)


CHECKPOINTS: dict[str, Checkpoint] = {
    "mha": Checkpoint(
        "deepseek-ai/deepseek-moe-16b-base",
        "multi-head attention",
        "deepseek",
        27,
        64,
        6,
        16.4,
        {
            **_DEEPSEEK,
            "num_hidden_layers": 28,
            "max_position_embeddings": 4096,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "rope_theta": 10000,
        },
    ),
    "mla": Checkpoint(
        "deepseek-ai/DeepSeek-V2-Lite",
        "multi-head latent attention",
        "deepseek_v2",
        26,
        64,
        6,
        15.7,
        {
            **_DEEPSEEK,
            "num_hidden_layers": 27,
            "max_position_embeddings": 163840,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "gqa": Checkpoint(
        "Qwen/Qwen3-30B-A3B",
        "grouped-query attention",
        "qwen3_moe",
        48,
        128,
        8,
        30.5,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
    "mamba2": Checkpoint(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
        "Mamba-2 with some grouped-query attention",
        "nemotron_h",
        23,
        128,
        6,
        31.6,
        {
            "vocab_size": 131072,
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "conv_kernel": 4,
            "chunk_size": 128,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "mlp_hidden_act": "relu2",
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gdn": Checkpoint(
        "Qwen/Qwen3.5-35B-A3B-Base",
        "Gated DeltaNet with some grouped-query attention",
        "qwen3_5_moe_text",
        40,
        256,
        8,
        34.7,
        {
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "max_position_embeddings": 262144,
            "rope_theta": 10000000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    ),
}
"""The paper's checkpoints, by the short name of their sequence mixer."""


def meta_model(name: str) -> Any:
    """The model of a checkpoint's shape on the meta device: every module, no memory.

    Args:
        name: A key of `CHECKPOINTS`.

    Raises:
        InputError: There is no such checkpoint.
    """
    if name not in CHECKPOINTS:
        raise InputError(f"no checkpoint {name!r} in the zoo: give one of {', '.join(CHECKPOINTS)}")
    from transformers import AutoConfig, AutoModelForCausalLM

    deepseek.register()
    checkpoint = CHECKPOINTS[name]
    config = AutoConfig.for_model(checkpoint.model_type, **checkpoint.config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
