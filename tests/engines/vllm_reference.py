"""Runs a DeepSeek-MoE checkpoint in vLLM, knowing nothing of this project, and saves what it computes.

    python vllm_reference.py CHECKPOINT PROMPTS.json OUT.safetensors

PROMPTS.json is a list of lists of ids, all equally long. OUT holds `logits` [prompts, T - 1, V], one
row a prompt token but the last, and `ids.LAYER` [prompts, T, k], what that layer's router chose.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model lives in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig


class ReferenceConfig(LlamaConfig):
    """Keeps whatever config.json says; transformers has no configuration of this type."""

    model_type = "deepseek"


class Capture:
    """Collects the ids that each layer's router chooses, through vLLM's own hook."""

    def __init__(self) -> None:
        self.ids: dict[str, list[torch.Tensor]] = {}

    def install(self, model: Any) -> str:
        """Sets the hook of every router; returns the model's class."""
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

        for name, module in model.named_modules():
            router = getattr(module, "router", None)
            if isinstance(router, BaseRouter):
                collected = self.ids.setdefault(name, [])
                router.set_capture_fn(lambda ids, into=collected: into.append(ids.clone()))
        return type(model).__name__


def main(checkpoint: str, prompts_path: str, out: str) -> None:
    AutoConfig.register("deepseek", ReferenceConfig)
    from vllm import LLM, SamplingParams

    prompts = json.loads(Path(prompts_path).read_text())
    engine = LLM(
        model=checkpoint,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=len(prompts[0]) + 1,
        max_num_seqs=1,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    )
    capture = Capture()
    (kind,) = engine.apply_model(capture.install)
    assert kind == "DeepseekForCausalLM", f"vLLM loaded {kind}"
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    logits = []
    for prompt in prompts:
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        rows = answer.prompt_logprobs[1:]
        logits.append([[row[token].logprob for token in range(len(row))] for row in rows])
    saved = {"logits": torch.tensor(logits)}
    for name, chosen in capture.ids.items():
        layer = name.split(".layers.")[1].split(".")[0]
        saved[f"ids.{layer}"] = torch.stack(chosen).to(torch.int64).contiguous()
    save_file(saved, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
