"""The five small models of the zoo: one a sequence mixer, alike in everything else.

All have four mixture layers of 64 experts, of which a token uses four, one tokenizer, one hidden
size and tied embeddings. What differs is what the five checkpoints of the paper differ in: the
mixer, the shared experts, the scoring of the router, and how it is kept balanced in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.zoo import deepseek

VOCAB_SIZE = 512
HIDDEN_SIZE = 96
NUM_EXPERTS = 64
TOP_K = 4
EXPERT_SIZE = 12
NUM_MOE_LAYERS = 4
MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Balancing:
    """How a router is kept from sending everything to few experts.

    Attributes:
        scope: The auxiliary loss balances every `sequence` or the whole `batch`.
        coefficient: Its weight; the loss is 1 where balanced, E / k where collapsed.
        bias_rate: Step by which an expert's selection bias rises where it got less than the mean,
            and falls where it got more (0: no bias).
    """

    scope: Literal["sequence", "batch"]
    coefficient: float
    bias_rate: float = 0.0

    @property
    def description(self) -> str:
        """One phrase for cards."""
        loss = f"auxiliary loss a {self.scope}, weight {self.coefficient:g}"
        return f"selection bias, rate {self.bias_rate:g}; {loss}" if self.bias_rate else loss


@dataclass(frozen=True)
class Species:
    """One small model's definition.

    Attributes:
        name: Short name of its mixer, the same as in `real.CHECKPOINTS`.
        mixer: The mixer in words.
        model_type: As in transformers.
        config: Fields of its configuration, beyond the common ones.
        balancing: How its router is balanced, after the family's own method.
    """

    name: str
    mixer: str
    model_type: str
    config: dict[str, Any] = field(repr=False)
    balancing: Balancing


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": EXPERT_SIZE,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": NUM_MOE_LAYERS + 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
}

SPECIES: dict[str, Species] = {
    "mla": Species(
        "mla",
        "multi-head latent attention (DeepSeek-V2)",
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        Balancing("sequence", 0.01),
    ),
    "mha": Species(
        "mha",
        "multi-head attention (DeepSeek-MoE)",
        "deepseek",
        _DEEPSEEK,
        Balancing("sequence", 0.01),
    ),
    "gqa": Species(
        "gqa",
        "grouped-query attention (Qwen3-MoE)",
        "qwen3_moe",
        {
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": NUM_MOE_LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": NUM_EXPERTS,
            "norm_topk_prob": True,
        },
        Balancing("batch", 0.01),
    ),
    "mamba2": Species(
        "mamba2",
        "Mamba-2 with one attention layer (Nemotron-H)",
        "nemotron_h",
        {
            "hybrid_override_pattern": "MEMEM*EME",
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "chunk_size": 64,
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 2 * EXPERT_SIZE,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "mlp_hidden_act": "relu2",
        },
        Balancing("sequence", 0.0001, bias_rate=0.001),
    ),
    "gdn": Species(
        "gdn",
        "Gated DeltaNet with one attention layer in four (Qwen3.5-MoE)",
        "qwen3_5_moe_text",
        {
            "num_hidden_layers": NUM_MOE_LAYERS,
            "full_attention_interval": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "num_experts": NUM_EXPERTS,
            "shared_expert_intermediate_size": 2 * EXPERT_SIZE,
        },
        Balancing("batch", 0.01),
    ),
}
"""The zoo, by the short name of the sequence mixer."""


def species(name: str) -> Species:
    """The definition of that name.

    Raises:
        InputError: There is none.
    """
    if name not in SPECIES:
        raise InputError(f"no model {name!r} in the zoo: give one of {', '.join(SPECIES)}")
    return SPECIES[name]


def build(kind: Species, **changes: Any) -> Any:
    """A model of this kind with fresh weights, drawn from torch's generator.

    Args:
        kind: What to build.
        changes: Fields of the configuration to change.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    deepseek.register()
    config = AutoConfig.for_model(kind.model_type, **{**_COMMON, **kind.config, **changes})
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
