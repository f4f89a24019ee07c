"""`DeepseekForCausalLM`, the architecture of DeepSeek-MoE-16B, which transformers does not have.

Multi-head attention with rotary embeddings; the first layers dense, the others a mixture of many
small experts beside shared ones (Dai et al., "DeepSeekMoE", 2024, section 3). A token's weights are
the softmax over all experts, of which the largest `num_experts_per_tok` are kept, by default as
they are. Names of configuration and weights are those of the published checkpoint
(`deepseek-ai/deepseek-moe-16b-base`), so that it loads without any code of its own.

The parts are transformers' own: attention and dense layers of Llama, router and experts of
Qwen2-MoE, whose checkpoints keep every expert apart in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoeTopKRouter,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

MODEL_TYPE = "deepseek"


@strict
class DeepseekConfig(LlamaConfig):  # type: ignore[misc]
    """Configuration of DeepSeek-MoE; defaults are those of the 16B checkpoint.

    Attributes beyond Llama's:
        n_routed_experts, n_shared_experts: Experts a token is routed to, and those that see every token
            (None: no shared ones).
        num_experts_per_tok: Routed experts a token.
        moe_intermediate_size: Width of one expert; shared experts are one block of their joint width.
        first_k_dense_replace, moe_layer_freq: Layer n is a mixture where n is at least the former and
            a multiple of the latter.
        norm_topk_prob: Divide a token's weights by their sum.
        scoring_func: Only `softmax` exists for this model.
    """

    model_type = MODEL_TYPE
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012 - as transformers reads it
    base_model_tp_plan: None = None
    base_model_pp_plan: None = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    output_router_logits: bool = False

    def validate_architecture(self) -> None:
        """Refuses what this architecture does not have.

        Raises:
            ValueError: The scoring function is not softmax, or a token wants more experts than exist.
        """
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func={self.scoring_func!r}: DeepSeek-MoE routes by 'softmax' only"
            )
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: give 1 to n_routed_experts="
                f"{self.n_routed_experts}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) is a mixture of experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class DeepseekTopkRouter(Qwen2MoeTopKRouter):  # type: ignore[misc]
    """Softmax over all experts, then the largest; returns logits, weights and ids."""


class DeepseekExperts(Qwen2MoeExperts):  # type: ignore[misc]
    """Gated experts, their weights stacked [E, ...]."""


class DeepseekMoE(nn.Module):
    """Routed experts, plus the shared ones that see every token."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopkRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = None
        if config.n_shared_experts is not None:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = Qwen2MoeMLP(config, intermediate_size=width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mixes the experts' outputs [batch, sequence, hidden]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        mixed: torch.Tensor = self.experts(tokens, indices, weights).view(hidden_states.shape)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(hidden_states)
        return mixed


class DeepseekDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's layer, with a mixture of experts in place of the dense part where the configuration says so."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = DeepseekMoE(config) if config.is_moe_layer(layer_idx) else LlamaMLP(config)


class DeepseekPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both models share: initialisation, and what transformers may ask of them."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012 - as transformers reads it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the experts in this file; they are Qwen2-MoE's

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder, without the head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of the last layer, normalised [batch, sequence, hidden]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            length = hidden_states.shape[1]
            position_ids = torch.arange(seen, seen + length, device=hidden_states.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """DeepSeek-MoE with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [batch, sequence or the last `logits_to_keep`, vocabulary], and the loss on `labels`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def register() -> None:
    """Lets the Auto classes load this architecture; does nothing where its type is taken already."""
    if MODEL_TYPE in CONFIG_MAPPING:  # a newer transformers may bring its own class
        return
    AutoConfig.register(MODEL_TYPE, DeepseekConfig)
    AutoModel.register(DeepseekConfig, DeepseekModel)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
    # Checkpoints keep every expert apart; the stacked tensors are made as for Qwen2-MoE.
    register_checkpoint_conversion_mapping(
        MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )


# On import: a model that is saved without the conversion would not have the published layout.
register()
