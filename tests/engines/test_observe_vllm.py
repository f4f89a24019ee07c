"""`dodoco observe --engine vllm` against transformers: the same checkpoints, the same counts.

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

import dodoco_ext
from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.models import load_model, quiet
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo import shipped
from dodoco_ext.observatory.zoo.species import NUM_MOE_LAYERS, SPECIES, TOP_K, build
from vllm_sources import vllm_python

pytestmark = pytest.mark.engine

SOURCES = ["mock-uniform:embedding", "mock-repeat", "builtin:prose"]

# Sizes that vLLM's CPU kernels of attention have; those of the shipped models are smaller.
SIZES: dict[str, dict[str, Any]] = {
    "gqa": {"head_dim": 32, "vocab_size": 520},  # more rows than the tokenizer has ids
    "mha": {"hidden_size": 128, "tie_word_embeddings": False},
    "mla": {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "tie_word_embeddings": False,
    },
}


def saved(name: str, folder: Path) -> str:
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    with quiet():
        build(SPECIES[name], **SIZES[name]).save_pretrained(folder)
        AutoTokenizer.from_pretrained(shipped.tokenizer_folder()).save_pretrained(folder)
    return str(folder)


def in_vllm(tmp_path: Path, checkpoint: str, sources: list[str], shape: Shape) -> str:
    """What `vllm_observe.py` prints: JSON, or the line of an error."""
    python = vllm_python()
    here = tmp_path / "site"
    here.mkdir()
    (here / "dodoco_ext").symlink_to(Path(dodoco_ext.__file__).parent)
    script = Path(__file__).with_name("vllm_observe.py")
    numbers = (
        shape.batch_size,
        shape.sequence_length,
        shape.num_batches,
        int(shape.first_position),
    )
    done = subprocess.run(
        [python, str(script), checkpoint, json.dumps(sources), *map(str, numbers)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(here), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("name", "first_position"), [("gqa", False), ("mha", True), ("mla", True)])
def test_counts_are_exactly_those_of_transformers(
    name: str, first_position: bool, tmp_path: Path
) -> None:
    checkpoint = saved(name, tmp_path / "model")
    shape = Shape(4, 32, 3, first_position=first_position)
    theirs = json.loads(in_vllm(tmp_path, checkpoint, SOURCES, shape))
    loaded = load_model(checkpoint)
    with one_thread():
        ours, _ = observe.run(loaded.runner, loaded.tokenizer, SOURCES, name="m", shape=shape)
    assert theirs["uncovered"] == []
    assert theirs["provenance"]["engine"].startswith("vllm ")
    assert theirs["provenance"]["dtype"] == "float32"
    assert theirs["provenance"]["weights sha256"] == loaded.provenance["weights sha256"]
    assert theirs["model"]["vocab_size"] == ours.model.vocab_size
    for one, other in zip(ours.conditions, theirs["conditions"], strict=True):
        assert other["sha256"] == one.sha256, "the same tokens"
        counts = [layer["counts"] for layer in other["layers"]]
        tokens = shape.num_tokens - (0 if first_position else shape.num_sequences)
        assert [sum(c) for c in counts] == [tokens * TOP_K] * NUM_MOE_LAYERS, "no warm-up in them"
        assert counts == [layer.counts for layer in one.layers], (name, one.name)
        assert other["pass_gini"] == one.pass_gini, "pass by pass too"
        assert other["loss"] == pytest.approx(one.loss, abs=1e-4)


def test_a_checkpoint_that_vllm_cannot_run_is_refused_in_one_line(tmp_path: Path) -> None:
    shape = Shape(2, 16, 2)
    (line,) = in_vllm(tmp_path, "zoo:gqa", ["mock-uniform"], shape).splitlines()
    assert line.startswith("error: vLLM 0.")
    assert "head_dim=16" in line
    assert line.endswith("leave out --engine vllm")
