"""Which rows of a pass are to be counted by this rank, so that all ranks count each token once.

* Tensor parallelism: every rank of a group routes the same rows. Each counts every n-th of them.
* Data parallelism: a router may be handed the rows of all ranks, one after the other. Each counts its own.

What is left has the padding of a CUDA graph at its end, which the number of valid rows cuts off. Where
that cannot be said, `why_not()` tells why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """A rank's place among those that route the same tokens.

    Attributes:
        tp_rank, tp_size: Its place among the ranks that hold the same tokens, and their number.
        dp_rank, dp_size: Its place among the ranks with tokens of their own, and their number.
    """

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @classmethod
    def of(cls, parallel: Any) -> Rows:
        """The place of this process, whose parallel groups vLLM has set up.

        Args:
            parallel: vLLM's `ParallelConfig`.
        """
        tp_size = int(parallel.tensor_parallel_size)
        tp_rank = 0
        if tp_size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            tp_rank = int(get_tp_group().rank_in_group)
        return cls(
            tp_rank, tp_size, int(parallel.data_parallel_rank), int(parallel.data_parallel_size)
        )

    @property
    def are_all(self) -> bool:
        """Whether all rows that a router is handed are this rank's to count."""
        return self.tp_size == 1 and self.dp_size == 1

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows that this rank counts: a view.

        Args:
            ids: What a router chose, `[T, k]`.
        """
        if self.dp_size > 1:
            from vllm.forward_context import get_forward_context

            context = get_forward_context().dp_metadata
            if context is not None and context.local_sizes is not None:
                ids = self.own(ids, context.local_sizes)
        return ids[self.tp_rank :: self.tp_size] if self.tp_size > 1 else ids

    def own(self, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """This data-parallel rank's rows, from those of all ranks or from its own.

        Args:
            ids: What a router chose, `[T, k]`.
            sizes: Rows of each data-parallel rank, padding included.
        """
        start, size = sum(sizes[: self.dp_rank]), sizes[self.dp_rank]
        return ids[start : start + size] if ids.shape[0] == sum(sizes) else ids

    def num_valid(self, tokens: int) -> int:
        """How many of the selected rows are real, where so many tokens were scheduled."""
        return max(0, -(-(tokens - self.tp_rank) // self.tp_size))


def why_not(parallel: Any) -> str:
    """Why the rows of this process cannot be counted exactly; "" if they can.

    Args:
        parallel: vLLM's `ParallelConfig`.
    """
    if parallel.enable_dbo:
        return "with --enable-dbo a pass is cut in two, and where its padding is cannot be said"
    if int(parallel.prefill_context_parallel_size) > 1:
        return "prefill context parallelism spreads the rows of a pass over ranks"
    if parallel.use_sequence_parallel_moe:
        return (
            "with tensor, data and expert parallelism together each rank routes a shard of the "
            "rows, and where its padding is cannot be said"
        )
    return ""
