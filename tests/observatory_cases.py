"""Small stand-ins for the observatory's tests: a byte tokenizer, a planted model, a made-up result."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dodoco_ext import nulls
from dodoco_ext.observatory.conditions import Kind
from dodoco_ext.observatory.result import (
    ConditionResult,
    LayerResult,
    ModelFacts,
    Overall,
    Result,
)
from dodoco_ext.observatory.summary import ratios
from toy import ToyBlock

VOCABULARY = 512
EXPERTS = 16
END = 256

TEXT = "\n".join(
    f"In row {n} the quick brown fox number {n * 7} jumps over {n % 5} lazy dogs."
    for n in range(600)
)


class ByteTokenizer:
    """One id a byte, an end-of-text id, and ids above that no text contains."""

    def __init__(self, size: int = VOCABULARY) -> None:
        self.size = size
        self.all_special_ids = [END]
        self.pad_token_id = None
        self.eos_token_id = END
        self.bos_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


class PlantedModel(torch.nn.Module):
    """A model whose every layer sends token t to the experts `table[t]`; logits prefer no token."""

    def __init__(self, table: NDArray[np.int64], num_layers: int = 2) -> None:
        super().__init__()
        vocabulary, top_k = table.shape
        self.embedding = torch.nn.Embedding(vocabulary, 4)
        self.blocks = torch.nn.ModuleList(
            ToyBlock(EXPERTS, top_k, 4, vocabulary, seed) for seed in range(num_layers)
        )
        for block in self.blocks:
            block.router.table.copy_(torch.from_numpy(table))
        self.modes: list[bool] = []

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.modes.append(self.training)
        hidden_states = self.embedding(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states, input_ids)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def even_table() -> NDArray[np.int64]:
    """Ids spread evenly over the experts: uniform ids are balanced, text is not."""
    first = np.arange(VOCABULARY) % EXPERTS
    return np.stack([first, (first + 1) % EXPERTS], axis=1)


def lopsided_table() -> NDArray[np.int64]:
    """The bytes of text are spread, every other id goes to experts 0 and 1."""
    table = even_table()
    table[128:] = (0, 1)
    return table


def a_result(
    gini: dict[str, Sequence[float]],
    kinds: dict[str, Kind],
    *,
    training: dict[str, Any] | None = None,
    loss: float = 5.0,
    num_parameters: int = 3_000_000,
) -> Result:
    """A result with one Gini a pass and condition (64 experts, top 4, 1024 tokens), two layers alike."""
    conditions = [a_condition(name, kinds[name], values, loss) for name, values in gini.items()]
    return Result(
        model=ModelFacts("planted <model>", "Planted", num_parameters, 2048, training),
        seed=0,
        batch_size=8,
        num_batches=len(next(iter(gini.values()))),
        conditions=conditions,
        ratios=ratios(conditions, seed=0),
        uncovered=[],
        texts={"builtin:prose": "0" * 64},
        provenance={"python": "3", "machine": "Linux x86_64, 2 CPU cores"},
        seconds=1.0,
    )


def a_condition(name: str, kind: Kind, gini: Sequence[float], loss: float) -> ConditionResult:
    mean = float(np.mean(gini))
    spread = float(np.std(gini))
    corrected = nulls.corrected_gini(gini, 1024, 64, 4)
    counts = [2**n % 61 + (n if kind == "mock" else 64 - n) for n in range(64)]
    layer = LayerResult(
        name="mlp.gate",
        num_experts=64,
        top_k=4,
        passes=len(gini),
        tokens=1024 * len(gini),
        assignments=4096 * len(gini),
        counts=counts,
        gini=mean,
        null_gini=0.068,
        null_gini_band=(0.058, 0.079),
        corrected_gini=corrected,
        window_gini=mean,
        max_over_mean=2.5,
        null_max_over_mean=1.3,
        null_max_over_mean_band=(1.2, 1.5),
        unused_experts=0,
        unused_experts_per_pass=0.0,
    )
    overall = Overall(
        gini=mean,
        null_gini=0.068,
        corrected_gini=corrected,
        corrected_gini_interval=(corrected - 2 * spread, corrected + 2 * spread),
        window_gini=mean,
        max_over_mean=2.5,
        null_max_over_mean=1.3,
        unused_experts=0.0,
    )
    source = {
        "mock": "mock-uniform",
        "control": "shuffled:builtin:prose",
        "real": f"builtin:{name}",
    }
    return ConditionResult(
        name=name,
        kind=kind,
        source=source[kind],
        description="made up",
        sha256="f" * 64,
        num_sequences=8 * len(gini),
        sequence_length=128,
        num_tokens=1024 * len(gini),
        loss=loss,
        layers=[layer, layer],
        overall=overall,
        pass_gini=[[g, g] for g in gini],
        pass_tokens=[[1024, 1024] for _ in gini],
    )
