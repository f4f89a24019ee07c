"""A stand-in for DeepEP's Buffer on the host, and the facts of the released one that it is held to.

Facts only, read from deep_ep/buffer.py of github.com/deepseek-ai/DeepEP: version 1.1.0 (commit
04b06f7a299c8be3e97ec1dee89e481ceb08ac10) and 1.2.1 (commit dcfd954851157f0bf683e1c3f1a7778f78344759). No code of it.
"""

from __future__ import annotations

from typing import Any

import torch

# Method -> parameters after self, in order, of 1.2.1.
SIGNATURES = {
    "dispatch": (
        "x", "handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank",
        "num_tokens_per_expert", "topk_idx", "topk_weights", "expert_alignment", "num_worst_tokens",
        "config", "previous_event", "async_finish", "allocate_on_comm_stream",
    ),
    "combine": (
        "x", "handle", "topk_weights", "bias", "config", "previous_event", "async_finish",
        "allocate_on_comm_stream",
    ),
    "low_latency_dispatch": (
        "x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts",
        "cumulative_local_expert_recv_stats", "dispatch_wait_recv_cost_stats", "use_fp8",
        "round_scale", "use_ue8m0", "async_finish", "return_recv_hook",
    ),
}  # fmt: skip
# How many things each returns, and which of them is the handle.
RESULTS = {"get_dispatch_layout": 5, "dispatch": 6, "combine": 3, "low_latency_dispatch": 5}
HANDLE_AT = {"dispatch": 4, "low_latency_dispatch": 2}
# The same of 1.1.0 where it differs: no counters.
OLD_LOW_LATENCY = (
    "x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts", "use_fp8", "async_finish",
    "return_recv_hook",
)  # fmt: skip
DTYPES = {
    "num_tokens_per_rank": torch.int32,  # [R]
    "num_tokens_per_expert": torch.int32,  # [E]
    "cumulative_local_expert_recv_stats": torch.int32,  # [E / R]
    "dispatch_wait_recv_cost_stats": torch.int64,  # [R, R]
}
# Intranode: (rank_prefix_matrix [R, R], channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx,
# is_token_in_rank, send_head); internode: ten parts, the seventh recv_gbl_rank_prefix_sum [R].
HANDLE_PARTS = {"intranode": 6, "internode": 10}


class EventOverlap:
    """What a call with async_finish=True returns, of deep_ep/utils.py."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream_wait(self) -> None:
        self.waits += 1

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.waits += 1


class Buffer:
    """One rank of a buffer whose other ranks are imagined: `matrix` says who sends how much to whom."""

    def __init__(self, matrix: torch.Tensor, rank: int) -> None:
        self.group_size, self.rank, self.matrix = len(matrix), rank, matrix.to(torch.int32)
        self.internode = False
        self.handed: dict[str, Any] = {}

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        return self.matrix[self.rank].clone(), None, None, None, None

    def dispatch(
        self, x: Any, handle: Any = None, num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None, is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Any = None,
        previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:  # fmt: skip
        rows, event = x[0] if isinstance(x, tuple) else x, EventOverlap() if async_finish else None
        received = rows.new_zeros(int(self.matrix[:, self.rank].sum()), rows.shape[1])
        if handle is not None:
            return received, None, None, None, None, event
        prefix = self.matrix.cumsum(0).to(torch.int32)
        if self.internode:
            parts: list[Any] = [torch.zeros(1) for _ in range(10)]
            parts[6] = prefix[:, self.rank]
        else:
            parts = [prefix, *(torch.zeros(1) for _ in range(5))]
        return received, None, None, [], tuple(parts), event

    def combine(
        self, x: Any, handle: Any, topk_weights: Any = None, bias: Any = None, config: Any = None,
        previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:  # fmt: skip
        event = EventOverlap() if async_finish else None
        return x.new_zeros(int(self.matrix[self.rank].sum()), x.shape[1]), None, event

    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Any = None, dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False,
        async_finish: bool = False, return_recv_hook: bool = False,
    ) -> Any:  # fmt: skip
        counts = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        mine = counts.view(self.group_size, -1)[self.rank].to(torch.int32)
        self.handed = {
            "cumulative_local_expert_recv_stats": cumulative_local_expert_recv_stats,
            "dispatch_wait_recv_cost_stats": dispatch_wait_recv_cost_stats,
        }
        if cumulative_local_expert_recv_stats is not None:
            cumulative_local_expert_recv_stats += mine
        if dispatch_wait_recv_cost_stats is not None:
            dispatch_wait_recv_cost_stats += 3
        return x, mine, (), None, None
