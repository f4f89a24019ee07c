"""Stand-ins for the parts of vLLM that the recorder touches, under vLLM's names, in `sys.modules`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

EXPERTS, REPLICAS, TOP_K, TOKENS = 8, 2, 2, 5
IDS = torch.arange(TOKENS * TOP_K, dtype=torch.int32).reshape(TOKENS, TOP_K) % EXPERTS


def ids_of(tokens: int) -> torch.Tensor:
    """The choices of so many tokens."""
    return torch.arange(tokens * TOP_K, dtype=torch.int32).reshape(tokens, TOP_K) % EXPERTS


class BaseRouter:
    """As vLLM's: one slot for a function that gets the logical ids."""

    def __init__(self) -> None:
        self.top_k = TOP_K
        self.global_num_experts = EXPERTS + REPLICAS
        self.capture_fn: Callable[[torch.Tensor], None] | None = None

    def set_capture_fn(self, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        self.capture_fn = capture_fn

    def select(self, ids: torch.Tensor) -> None:
        if self.capture_fn is not None:
            self.capture_fn(ids)


class MoERunner(torch.nn.Module):
    def __init__(self, router: Any, monolithic: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.router = router
        self.is_monolithic = monolithic
        self.moe_config = SimpleNamespace(num_logical_experts=EXPERTS)
        self.routed_experts = SimpleNamespace(quant_method=SimpleNamespace())


class MegaExperts(torch.nn.Module):
    """As vLLM's `DeepseekV4MegaMoEExperts`: no `MoERunner`, and a slot of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.capture_fn = None


class WorkerWrapperBase:
    """As vLLM's: makes the worker, and passes on what it is asked."""

    def init_device(self) -> None:
        self.worker.init_device()

    def __getattr__(self, name: str) -> Any:
        if name == "worker":
            raise AttributeError(name)
        return getattr(self.worker, name)


@contextmanager
def listening() -> Iterator[list[str]]:
    """The lines of the plugin, as they come."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("vllm.dodoco")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


class Group:
    """As vLLM's `GroupCoordinator`."""

    def __init__(self, ranks: list[int], rank_in_group: int) -> None:
        self.ranks, self.rank_in_group = ranks, rank_in_group


def parallel(**changes: Any) -> SimpleNamespace:
    """vLLM's `ParallelConfig` of one process, with changes."""
    fields = {
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "data_parallel_rank": 0,
        "prefill_context_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_dbo": False,
        "use_sequence_parallel_moe": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def config(**changes: Any) -> SimpleNamespace:
    """vLLM's `VllmConfig`, with changes to the parallel configuration."""
    return SimpleNamespace(
        parallel_config=parallel(**changes),
        model_config=SimpleNamespace(served_model_name="tiny"),
        compilation_config=SimpleNamespace(cache_dir=""),
        additional_config={},
        instance_id="abcde_dp1",
    )


def scheduled(tokens: int) -> SimpleNamespace:
    """vLLM's `SchedulerOutput`."""
    return SimpleNamespace(total_num_scheduled_tokens=tokens)


class Runner:
    """A model runner: what both of vLLM's have in common.

    Args:
        padded: Rows that a pass is padded to, as a CUDA graph's is; 0: none.
        draft: Whether there is a draft model.
    """

    def __init__(self, layers: int = 2, padded: int = 0, draft: bool = False) -> None:
        self.padded = padded
        self.model = torch.nn.ModuleList(MoERunner(BaseRouter()) for _ in range(layers))
        self.draft = torch.nn.ModuleList([MoERunner(BaseRouter())]) if draft else None

    def get_model(self) -> torch.nn.Module:
        return self.model

    def get_draft_model(self) -> torch.nn.Module | None:
        return self.draft

    def forward(self, tokens: int) -> None:
        for layer in self.model:
            layer.router.select(ids_of(max(tokens, self.padded)))

    def propose(self) -> None:
        if self.draft is not None:
            self.draft[0].router.select(ids_of(1))

    def sample_tokens(self, grammar_output: Any) -> str:
        self.propose()
        return "sampled"


class Runner1(Runner):
    """As `v1/worker/gpu_model_runner.py`: dummy runs call the model themselves."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> str:
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._dummy_run(1)
        else:
            self.forward(scheduler_output.total_num_scheduled_tokens)
        return "executed"

    def _dummy_run(self, num_tokens: int) -> None:
        self.forward(num_tokens)
        self.propose()


class Runner2(Runner):
    """As `v1/worker/gpu/model_runner.py`: dummy runs are steps that say so."""

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> str:
        if scheduler_output.total_num_scheduled_tokens:
            self.forward(scheduler_output.total_num_scheduled_tokens)
        return "executed"

    def _dummy_run(self, num_tokens: int) -> None:
        self.execute_model(scheduled(num_tokens), intermediate_tensors=None, dummy_run=True)
        self.propose()


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    version: str = "0.32.0",
    groups: dict[str, Group] | None = None,
    sizes: list[int] | None = None,
) -> None:
    """Puts the stand-ins where vLLM's own would be.

    Args:
        version: Of vLLM.
        groups: The groups of ranks, by `tp` and `ep`.
        sizes: Rows of each data-parallel rank in the pass under way.
    """
    moe = "vllm.model_executor.layers.fused_moe"
    context = SimpleNamespace(dp_metadata=SimpleNamespace(local_sizes=sizes) if sizes else None)
    known = groups or {}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        f"{moe}.router.base_router": {"BaseRouter": BaseRouter},
        f"{moe}.runner.moe_runner": {"MoERunner": MoERunner},
        "vllm.v1.worker.worker_base": {"WorkerWrapperBase": WorkerWrapperBase},
        "vllm.forward_context": {"get_forward_context": lambda: context},
        "vllm.distributed.parallel_state": {
            "get_tp_group": lambda: known["tp"],
            "get_ep_group": lambda: known["ep"],
        },
    }
    for name, attributes in contents.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            part = ".".join(parts[:length])
            if part not in contents or length == len(parts):
                module = ModuleType(part)
                vars(module).update(attributes if length == len(parts) else {})
                monkeypatch.setitem(sys.modules, part, module)
