"""A mixture-of-experts model of a few lines, whose routers send each token where a table says."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from dodoco_ext import reference
from dodoco_ext.attachment import Attachment


class Refusal(Exception):
    """What a model raises that was told to fail."""


class PlantedRouter(torch.nn.Module):
    """Looks the experts of a token up in a table [vocabulary, k]."""

    table: torch.Tensor

    def __init__(self, num_experts: int, top_k: int, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        generator = torch.Generator().manual_seed(seed)
        # Skewed: low ids are chosen more often.
        skew = torch.rand(vocabulary, num_experts, generator=generator) * torch.arange(
            1, num_experts + 1
        )
        self.register_buffer("table", skew.topk(top_k, dim=1, largest=False).indices)
        self.weights = torch.nn.Parameter(torch.rand(vocabulary, top_k, generator=generator))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.softmax(self.weights[tokens], dim=-1), self.table[tokens]


class ToyExperts(torch.nn.Module):
    """Each expert scales its input by a vector of its own."""

    def __init__(self, num_experts: int, width: int, seed: int) -> None:
        super().__init__()
        self.fails = False
        generator = torch.Generator().manual_seed(seed)
        self.scale = torch.nn.Parameter(torch.randn(num_experts, width, generator=generator))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.fails:
            raise Refusal
        mixed = (self.scale[top_k_index] * top_k_weights.unsqueeze(-1)).sum(dim=-2)
        return torch.tanh(hidden_states * mixed)


class ToyBlock(torch.nn.Module):
    """Router and experts, as discovery wants them: a child `experts` that takes `top_k_index`."""

    def __init__(
        self, num_experts: int, top_k: int, width: int, vocabulary: int, seed: int
    ) -> None:
        super().__init__()
        self.router = PlantedRouter(num_experts, top_k, vocabulary, seed)
        self.experts = ToyExperts(num_experts, width, seed)

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(tokens)
        return hidden_states + self.experts(hidden_states, ids, weights)


class ToyModel(torch.nn.Module):
    """Embedding, then blocks. Set `checkpointing` to recompute blocks in the backward pass.

    Attributes:
        checkpointing: None, "reentrant" or "non-reentrant".
    """

    def __init__(
        self,
        num_layers: int = 3,
        num_experts: int = 8,
        top_k: int = 2,
        width: int = 16,
        vocabulary: int = 32,
    ) -> None:
        super().__init__()
        self.checkpointing: str | None = None
        self.vocabulary = vocabulary
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.embedding.weight.data.copy_(torch.randn(vocabulary, width, generator=generator))
        self.layers = torch.nn.ModuleList(
            ToyBlock(num_experts, top_k, width, vocabulary, seed) for seed in range(num_layers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointing is None:
                hidden_states = layer(hidden_states, tokens)
            else:
                reentrant = self.checkpointing == "reentrant"
                hidden_states = checkpoint(layer, hidden_states, tokens, use_reentrant=reentrant)
        return hidden_states

    def ids(self, tokens: torch.Tensor) -> list[NDArray[np.int64]]:
        """The planted ids of each layer, [T, k]."""
        return [layer.router.table[tokens.reshape(-1)].numpy() for layer in self.layers]


def some_tokens(
    shape: tuple[int, ...] = (2, 9), seed: int = 0, vocabulary: int = 32
) -> torch.Tensor:
    """Token ids of a ToyModel."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def assert_recorded(attachment: Attachment, model: ToyModel, passes: list[torch.Tensor]) -> None:
    """Every layer's counters are those of these passes, all of them and no other."""
    layers = attachment.snapshot().layers
    assert len(layers) == len(model.layers)
    for index, layer in enumerate(layers):
        expected = [
            reference.route_ids(model.ids(tokens)[index], layer.num_experts) for tokens in passes
        ]
        counts = sum((each.counts for each in expected), np.zeros(layer.num_experts, np.int64))
        np.testing.assert_array_equal(layer.counts, counts)
        assert layer.passes == len(passes)
        assert layer.tokens == sum(each.tokens for each in expected)
        assert layer.assignments == sum(each.assignments for each in expected)
        assert (layer.padded, layer.invalid) == (0, 0)
