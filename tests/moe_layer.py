"""A mixture-of-experts layer with expert parallelism, as people write it: route, permute, send, compute, send back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional


class AllToAll(torch.autograd.Function):
    """`all_to_all_single` with a backward that sends the gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.back = (sent, received, group)
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return AllToAll.apply(gradients[0], *ctx.back), None, None, None


class AsyncAllToAll(AllToAll):
    """The same, waited for by the caller of an asynchronous call."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.back = (sent, received, group)
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            out, rows.contiguous(), received, sent, group=group, async_op=True
        )
        work.wait()
        return out


class SavesItsInput(AllToAll):
    """The same, with a tensor that checkpointing must compute again before the gradients leave."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return AllToAll.forward(ctx, rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        assert len(ctx.saved_tensors) == 1
        return AllToAll.apply(gradients[0], *ctx.back), None, None, None


def of_functions(rows: torch.Tensor, received: list[int], sent: list[int], group: Any) -> Any:
    return functional.all_to_all_single_autograd(rows, received, sent, group)


STYLES: dict[str, Any] = {
    "function": AllToAll.apply,
    "async": AsyncAllToAll.apply,
    "saving": SavesItsInput.apply,
    "functional": of_functions,
}


class MoELayer(torch.nn.Module):
    """Top-k routing over `num_experts`, an equal share of them on each rank of the group.

    Attributes:
        sent: Rows to each rank, counted from the routing map of each forward call, [R] each.
    """

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, group: Any, style: str, skew: float = 1.0
    ) -> None:
        super().__init__()
        self.group, self.top_k, self.num_experts = group, top_k, num_experts
        self.num_ranks = dist.get_world_size(group)
        self.num_local = num_experts // self.num_ranks
        self.router = torch.nn.Linear(hidden, num_experts)
        self.experts = torch.nn.ModuleList(
            torch.nn.Linear(hidden, hidden) for _ in range(self.num_local)
        )
        self.send = STYLES[style]
        self.sent: list[list[int]] = []
        with torch.no_grad():
            self.router.bias -= skew * torch.arange(num_experts).log1p()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(tokens).softmax(-1).topk(self.top_k)
        routing_map = torch.zeros(len(tokens), self.num_experts, dtype=torch.bool)
        routing_map.scatter_(1, ids, value=True)
        self.sent.append(
            routing_map.view(len(tokens), self.num_ranks, self.num_local).sum((0, 2)).tolist()
        )

        expert, order = ids.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent = counts.view(self.num_ranks, -1).sum(1).tolist()
        received = arriving.view(self.num_ranks, -1).sum(1).tolist()

        rows = self.send(tokens[order // self.top_k], received, sent, self.group)
        local = torch.arange(self.num_local).repeat(self.num_ranks).repeat_interleave(arriving)
        computed = torch.zeros_like(rows)
        for index, expert_module in enumerate(self.experts):
            mine = (local == index).nonzero().flatten()
            computed = computed.index_copy(0, mine, expert_module(rows[mine]))
        back = self.send(computed, sent, received, self.group)
        weighted = back * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, order // self.top_k, weighted)
