"""What Megatron's probes add to a dispatcher's transfers, the way back included."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dodoco_ext

from .figures import Figures, in_us
from .interleave import Contestant, interleave

RANKS, ROWS = 8, 16


def test_a_dispatch_a_combine_and_their_backward(
    figures: Figures, recordings: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins that send nothing: what is left of four transfers is what probes cost."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tests"))
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        stubs: Any = __import__("megatron_stubs")
        dispatchers = [stubs.MoEAlltoAllTokenDispatcher(ep_size=RANKS) for _ in range(2)]
        model = stubs.Model(dispatchers[1])
        with dodoco_ext.megatron.attach(model):
            contestants = {
                name: Contestant(_transfers(dispatcher))
                for name, dispatcher in zip(("bare", "probed"), dispatchers, strict=True)
            }
            timings = interleave(contestants, num_blocks=figures.blocks(300))
    finally:
        dist.destroy_process_group()
        sys.modules.pop("megatron_stubs", None)
    table = figures.table(
        "Four transfers of a Megatron layer over 8 ranks, us of CPU time", ("", "p20/p50/p80")
    )
    for name in contestants:
        cost = timings.time(name)
        figures.add(f"megatron/{name}", cost)
        table.rows.append((name, " / ".join(map(in_us, (cost.p20, cost.p50, cost.p80)))))


def _transfers(dispatcher: Any) -> Any:
    each = np.full(RANKS, ROWS // RANKS)
    dispatcher.preprocess((each, each, None))
    dispatcher.tokens_per_expert = torch.tensor([ROWS])
    tokens, probs = torch.ones(ROWS, 16, requires_grad=True), torch.ones(ROWS)

    def run() -> None:
        out, _ = dispatcher.token_dispatch(tokens, probs)
        dispatcher.token_combine(out).sum().backward()
        tokens.grad = None
        dispatcher.calls.clear()

    return run
