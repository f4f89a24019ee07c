"""Keeping routers balanced in training: an auxiliary loss, and a bias on the choice of experts."""

from __future__ import annotations

from typing import Any

import torch

from dodoco_ext.observatory.zoo.species import Balancing


class Balancer:
    """Balances every layer of one model by itself.

    Args:
        model: A model whose routers return logits, weights and ids.
        balancing: The method.
        top_k: Experts a token.
    """

    def __init__(self, model: Any, balancing: Balancing, top_k: int) -> None:
        self._balancing = balancing
        self._top_k = top_k
        self._biases: list[torch.Tensor] = [
            buffer
            for name, buffer in model.named_buffers()
            if name.endswith("e_score_correction_bias")
        ]
        self._counts: list[torch.Tensor] = []

    def loss(self, router_logits: tuple[torch.Tensor, ...], num_sequences: int) -> torch.Tensor:
        """Mean auxiliary loss of the layers: 1 where balanced, E / k where collapsed.

        E sum_e f_e p_e, with f_e the share of the assignments that expert e got and p_e its mean
        score among all experts (Fedus et al., "Switch Transformers", 2021, equations 4 to 6),
        over the batch or over every sequence (DeepSeek-V3 report, 2024, equations 17 to 20).

        Args:
            router_logits: Of each layer [tokens, E], sequence after sequence.
            num_sequences: Sequences of the batch.
        """
        self._counts = []
        groups = num_sequences if self._balancing.scope == "sequence" else 1
        losses = []
        for layer, logits in enumerate(router_logits):
            num_experts = logits.shape[-1]
            if self._biases:
                scores = logits.float().sigmoid()
                choice = (scores + self._biases[layer]).topk(self._top_k, dim=-1).indices
                scores = scores / scores.sum(dim=-1, keepdim=True)
            else:
                scores = logits.float().softmax(dim=-1)
                choice = scores.topk(self._top_k, dim=-1).indices
            chosen = torch.zeros_like(scores).scatter_(-1, choice, 1.0)
            self._counts.append(chosen.sum(dim=0).detach())
            share = chosen.view(groups, -1, num_experts).mean(dim=1) / self._top_k
            probability = scores.view(groups, -1, num_experts).mean(dim=1)
            losses.append(num_experts * (share * probability).sum(dim=-1).mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update_biases(self) -> None:
        """Raises the bias of experts below the mean load of the last batch, and lowers the others'.

        Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024),
        algorithm 1.
        """
        for bias, counts in zip(self._biases, self._counts, strict=False):
            bias += self._balancing.bias_rate * (counts.mean() - counts).sign()
