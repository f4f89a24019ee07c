"""How each MoE family of the installed transformers is built small, and what its routing truth is.

A family is a folder of ``transformers.models`` whose modelling file speaks of experts. The list is
read from the installed package, so a family that appears in a future version is built by the
generic rule or fails by name; it cannot be missing silently.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128
NUM_EXPERTS = 8
TOP_K = 2
BATCH, SEQUENCE = 2, 12

# Taken by every configuration that has a field of this name. Nothing else has as many classes as a
# router has experts, so that an observer of torch.topk knows the routers' calls by their shape: two
# groups of four experts, sequences of 12.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "share_expert_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 4,
    "chunk_size": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}

SPARSE = ["sparse", "sparse"]
HYBRID = ["linear_attention", "full_attention"]

# What a family's configuration needs beyond the generic rule. None removes the generic value.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"mlp_layer_types": SPARSE},
    "axk2": {"mlp_layer_types": SPARSE},
    "bailing_hybrid": {"layer_types": HYBRID, "mlp_layer_types": SPARSE},
    "beam": {"mlp_layer_types": SPARSE},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K, "ffn_hidden_size": 16},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_ocr2": {"mlp_layer_types": SPARSE},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    # The number of keys is the square root of the number of experts.
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note": {"num_key_value_heads": 4, "mlp_layer_types": SPARSE},
    "dots3_note.vision": {
        "mlp_layer_types": SPARSE,
        "patch_size": 4,
        "router_scaling_factor": 1.0,
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 8],
        "mlp_layer_types": SPARSE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "glm4_moe_lite": {"mlp_layer_types": SPARSE},
    "glm4v_moe": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
    },
    "glm5_next": {
        "index_kpool": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": SPARSE,
    },
    "granitemoehybrid": {"layer_types": HYBRID},
    "hy_v3": {"mlp_layer_types": SPARSE},
    "hy_v4": {"mlp_layer_types": SPARSE},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "kimi_linear": {"layer_types": HYBRID, "mlp_layer_types": SPARSE},
    "laguna": {"mlp_layer_types": SPARSE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 4},
    "mimo_v2_flash": {"mlp_layer_types": SPARSE},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "nllb_moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "moe_eval_capacity_token_fraction": 0.25,
    },
    "qwen3_5_moe": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen3_omni_moe.talker": {"shared_expert_intermediate_size": 16},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"mlp_layer_types": SPARSE},
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 2,
    },
    "unlimited_ocr": {"mlp_layer_types": SPARSE},
    "vitpose_backbone": {"num_experts": 3, "part_features": 8, "image_size": [32, 32]},
    "zaya": {"num_experts_per_tok": 1},
}

MODEL_CLASSES = {
    "dots3_note.vision": "Dots3NoteVisionModel",
    "qwen3_omni_moe.talker": "Qwen3OmniMoeTalkerModel",
    "vitpose_backbone": "VitPoseBackbone",
}

PARTS = ("dots3_note.vision", "qwen3_omni_moe.talker")
"""Second models of a family with routers of their own classes, beside its language model."""

NOT_ROUTED = {"vitpose_backbone": "the caller names the expert"}
"""Families with experts and no router: they must be reported as uncovered."""

ROW = "transformers_family"
"""Name of the test property that carries a family's row of the table."""

DOCUMENT = """\
# MoE families of transformers

Generated by `pytest tests/engines/test_transformers_families.py --families-table FILE` with
transformers {version}: {count} models, among them one of every folder of `transformers.models`
that speaks of experts, each built small with random weights and run with and without probes.
*passed* means: the counts of every expert equal those of an independent observer, the outputs are
bit-identical, and every hook and attribute is restored; other tests of that file check the same
when the model raises. A family that cannot be built small is listed as *not built*, with the
reason.

How a router's choice is obtained: `forward` is a probe at the router's `forward` that reads its output,
`forward_pre` one on the module that is handed the ids (the experts, or Doge's embedding of them).
`experts` is the number of classes that the router chooses among.

What to know about some of them:

* **Longcat Flash**: zero (identity) experts are choices like any other; they are the last classes.
* **Zaya**: the last class stands for skipping the block. The router itself hands skipped tokens to
  expert 0 with weight 0; they are not counted there.
* **Switch, NLLB**: the maps are those after capacity; what was dropped is `capacity_dropped`.
  Tokens that NLLB's router masks as padding are counted there too. Recorded is what the router
  chose: NLLB's experts take the one-hot mask for ids, so that in fact only experts 0 and 1 compute.
* **JetMoe** has two routers a layer (attention and feed-forward), **Ernie 4.5 VL** two (text and
  vision tokens).
* **DeepSeek-V4**: the hash-routed layers are read at the experts, the others at the router.
* **GPT-OSS in MXFP4**: its kernels route without calling the router: uncovered, unless loaded with
  `Mxfp4Config(dequantize=True)`.
* **VitPose**: its experts are named by the caller (`dataset_index`), not routed: uncovered.
* A block whose `forward` was replaced on the instance, as hub kernels do, is uncovered.

"""

NOT_BUILT: dict[str, str] = {}
"""Families that cannot be built small, and why."""


def families() -> list[str]:
    """Every folder of the installed ``transformers.models`` that speaks of experts."""
    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if re.search(r"\bexperts\b", path.read_text(encoding="utf-8"))
    )


def build(family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Builds a family's language model with random weights.

    Args:
        family: A name out of `families`.

    Returns:
        The model in eval mode and the keyword arguments of a forward pass over [2, 12] tokens.
    """
    model_class = _model_class(family)
    config_class = model_class.config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # multi-head latent attention has a key per query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings.update(OVERRIDES.get(family, {}))
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).eval()
    _spread(model)
    return model, _inputs(family, model)


def _model_class(family: str) -> Any:
    folder = family.partition(".")[0]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    models = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedModel)
        and value.__module__ == module.__name__
    }
    if family in MODEL_CLASSES:
        return models[MODEL_CLASSES[family]]
    for ending in ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model"):
        for name, value in models.items():
            if name.endswith(ending) and not name.endswith("PreTrainedModel"):
                return value
    raise LookupError(f"no model class in {module.__name__}")


def _spread(model: torch.nn.Module) -> None:
    """Gives routers random weights and biases large enough to choose differently by token."""
    for module in model.modules():
        if not re.search(r"Router|Gate$|Gating", type(module).__name__):
            continue
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.normal_(std=0.1)
                elif name == "tid2eid":
                    buffer.copy_(torch.rand(len(buffer), NUM_EXPERTS).argsort(-1)[:, :TOP_K])


def _inputs(family: str, model: torch.nn.Module) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB_SIZE, (BATCH, SEQUENCE))
    if family == "vitpose_backbone":
        return {
            "pixel_values": torch.randn(BATCH, 3, 32, 32),
            "dataset_index": torch.tensor([0, 1]),
        }
    if family == "dots3_note.vision":
        return {"pixel_values": torch.randn(24, 48), "grid_thw": torch.tensor([[1, 6, 4]])}
    if family == "qwen3_omni_moe.talker":
        return {"inputs_embeds": torch.randn(BATCH, SEQUENCE, 32)}
    if family == "ernie4_5_vl_moe":
        is_vision = (torch.arange(SEQUENCE) % 3 == 0).int().expand(BATCH, -1)
        return {"input_ids": ids, "moe_mm_token_type_ids": is_vision}
    if family in ("nllb_moe", "switch_transformers"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"input_ids": ids}
