"""Megatron-Core on a CPU, over gloo: stand-ins for what it takes from CUDA, and a small model.

Import it before anything of Megatron.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

warnings.simplefilter("ignore")  # Megatron tells at import which optional packages are missing


class _Event:
    def synchronize(self) -> None:
        pass


class _Stream:
    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


_current = _Stream()
torch.cuda.Stream = _Stream
torch.cuda.current_stream = lambda *args: _current
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *args: None
torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _on_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return on_host


torch.zeros, torch.tensor = _on_host(torch.zeros), _on_host(torch.tensor)

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


moe_utils.te_general_gemm = None
moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _moved
megatron_random.initialize_rng_tracker(inference_rng_tracker=True)
megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

HIDDEN, EXPERTS, TOP_K, VOCABULARY, SEQUENCE = 32, 8, 2, 64, 16

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "torch": {},  # torch's checkpoint that is not reentrant, around each MoE layer
}


def build(
    *,
    expert_parallel: int = 1,
    recompute: str = "none",
    seed: int = 1,
    vp_stage: int | None = None,
    **changes: Any,
) -> GPTModel:
    """A GPT of two MoE layers, the same for the same seed; `changes` go to its configuration."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 32,
        "ffn_hidden_size": 64,
        "expert_model_parallel_size": expert_parallel,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        **RECOMPUTE[recompute],
        **changes,
    }
    torch.manual_seed(seed)
    config = TransformerConfig(**values)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
    )
    if recompute == "torch":
        for layer in model.decoder.layers:
            layer.mlp.forward = _checkpointed(layer.mlp.forward)
    return model


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def inputs(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, S] with their positions and a causal mask, as the model takes them."""
    batch, length = tokens.shape
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    return tokens, torch.arange(length).expand(batch, length), mask


def loss_of(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of predicting tokens [B, S] from themselves."""
    return model(*inputs(tokens), labels=tokens).mean()
