"""DeepSeek-MoE against vLLM's implementation of it: the same small checkpoint, the same prompts.

vLLM may live in an environment of its own: `VLLM_PYTHON` names that environment's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

from dodoco_ext.observatory.zoo import deepseek
from vllm_sources import vllm_python

pytestmark = pytest.mark.engine

PROMPTS, LENGTH, TOP_K = 3, 24, 4
FIRST_MOE, LAYERS = 1, 3


def small_model(norm_topk_prob: bool) -> Any:
    torch.manual_seed(0)
    config = deepseek.DeepseekConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        first_k_dense_replace=FIRST_MOE,
        norm_topk_prob=norm_topk_prob,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.15,  # logits far from alike, so that a wrong layer shows
    )
    return deepseek.DeepseekForCausalLM(config).eval()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_and_routed_ids_are_those_of_vllm(norm_topk_prob: bool, tmp_path: Path) -> None:
    python = vllm_python()
    model = small_model(norm_topk_prob)
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(0, 128, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    out = tmp_path / "vllm.safetensors"
    script = Path(__file__).with_name("vllm_reference.py")
    arguments = [str(tmp_path / "model"), str(tmp_path / "prompts.json"), str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(out)

    with torch.inference_mode():
        ours = model(input_ids=prompts, output_router_logits=True)
    spread = float(ours.logits.std())
    assert spread > 0.5, "logits too alike to tell a wrong layer"
    torch.testing.assert_close(theirs["logits"], ours.logits[:, :-1], rtol=1e-4, atol=1e-4)

    assert sorted(theirs) == [*(f"ids.{n}" for n in range(FIRST_MOE, LAYERS)), "logits"]
    for layer, router_logits in enumerate(ours.router_logits, start=FIRST_MOE):
        ranked = router_logits.sort(dim=-1, descending=True).values
        gap = (ranked[:, TOP_K - 1] - ranked[:, TOP_K]).min()
        assert gap > 1e-4, "a tie at the edge of the choice: choose another seed"
        chosen = router_logits.topk(TOP_K, dim=-1).indices.view(PROMPTS, LENGTH, TOP_K)
        expected = chosen.sort(dim=-1).values
        assert torch.equal(theirs[f"ids.{layer}"].sort(dim=-1).values, expected), layer
