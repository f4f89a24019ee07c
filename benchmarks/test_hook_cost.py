"""What a probe adds to a router: bare, attached but disabled, recording, and two usual ways.

pytest-benchmark prints each way by itself; what is claimed comes from interleaved blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

import dodoco_ext as dodoco

from .figures import TOLERANCE, Figures, in_us
from .interleave import Contestant, interleave

NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN = 32, 128, 8, 256
LIMIT_S = 7e-6


class Router:
    """transformers' router of Qwen3-MoE, and the ways of watching it, switched without a trace."""

    def __init__(self) -> None:
        modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = modeling.Qwen3MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=8,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        )
        torch.manual_seed(0)
        block = modeling.Qwen3MoeSparseMoeBlock(config)
        self.module = block.gate
        torch.nn.init.normal_(self.module.weight)
        self.hidden = torch.randn(NUM_TOKENS, HIDDEN)
        self.attachment = dodoco.attach(block)
        self._probe = self.module.__dict__["forward"]
        self._totals = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
        self._host_totals = torch.zeros(NUM_EXPERTS, dtype=torch.int64)

    @torch.no_grad()
    def run(self) -> None:
        self.module(self.hidden)

    def _hook(self, *hooks: Callable[..., None]) -> None:
        self.module._forward_hooks.clear()
        self.module._forward_hooks.update(enumerate(hooks))
        self.module.__dict__.pop("forward", None)

    def bare(self) -> None:
        self._hook()

    def empty_hook(self) -> None:
        self._hook(lambda module, args, output: None)

    def disabled(self) -> None:
        self._hook()
        self.module.__dict__["forward"] = self._probe
        self.attachment.enabled = False

    def recording(self) -> None:
        self._hook()
        self.module.__dict__["forward"] = self._probe
        self.attachment.enabled = True

    def one_hot_sum(self) -> None:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._totals += functional.one_hot(output[2], NUM_EXPERTS).sum(dim=(0, 1))

        self._hook(hook)

    def bincount_to_host(self) -> None:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            counts = torch.bincount(output[2].view(-1), minlength=NUM_EXPERTS)
            self._host_totals += counts.cpu()

        self._hook(hook)

    def close(self) -> None:
        self.bare()
        self.attachment.detach()


@pytest.fixture
def router(recordings: object) -> Iterator[Router]:
    made = Router()
    yield made
    made.close()


WAYS = ("bare", "disabled", "recording", "one_hot_sum", "bincount_to_host")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group="router of 32 tokens, 8 of 128 experts", max_time=0.5, warmup=True)
def test_router(benchmark: Any, router: Router, way: str) -> None:
    getattr(router, way)()
    benchmark(router.run)


def test_a_probe_adds_little_to_a_router(figures: Figures, router: Router) -> None:
    ways = ("bare", "empty_hook", *WAYS[1:])
    timings = interleave(
        {way: Contestant(router.run, getattr(router, way)) for way in ways},
        num_blocks=figures.blocks(600),
        block_s=2e-3,
    )
    table = figures.table(
        "A router (32 tokens, 8 of 128 experts) with a hook, us of CPU time",
        ("way", "router (p20/p50/p80)", "over bare (p20/p50/p80)", "interval of the median"),
    )
    for way in ways:
        cost = figures.add(f"router/{way}", timings.time(way))
        over = timings.difference(way, "bare")
        quantiles = (
            " / ".join(in_us(summary_s) for summary_s in (summary.p20, summary.p50, summary.p80))
            for summary in (cost, over)
        )
        interval = f"{in_us(over.low)} to {in_us(over.high)}" if way != "bare" else "-"
        table.rows.append((way.replace("_", " "), *quantiles, interval))
        figures.add(f"router/{way} over bare", over)
    over = timings.difference("recording", "bare")
    figures.judge("router/recording over bare", over, LIMIT_S, LIMIT_S * (1 + TOLERANCE))
