"""Models compiled by torch.compile for the GPU, CUDA-graph trees included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
from toy import ToyModel, assert_recorded, some_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_call_of_a_compiled_model_counts_once(place: str, cuda: Any, mode: str) -> None:
    if place == "cpu" and mode != "default":
        pytest.skip("the CPU has no graphs: one mode says it all")
    twin, model = ToyModel(num_layers=2), ToyModel(num_layers=2).to(place).eval()
    with dodoco.attach(model, lanes=4) as a, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        with a.paused():
            for _ in range(4):  # compiled, warmed up, captured
                compiled(some_tokens().to(place))
        cuda.synchronize()
        passes = [some_tokens(seed=seed) for seed in range(25)]
        for tokens in passes:
            compiled(tokens.to(place))
        cuda.synchronize()
        assert_recorded(a, twin, passes)
        assert a.reader.header["num_faults"] == 0
    torch._dynamo.reset()


def test_graph_trees_are_not_skipped(place: str, cuda: Any, driver_decides: None) -> None:
    from torch._dynamo.utils import counters

    model = ToyModel(num_layers=2).to(place).eval()
    counters.clear()
    with dodoco.attach(model, lanes=4) as a, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(5):
            compiled(some_tokens().to(place))
        cuda.synchronize()
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert [layer.passes for layer in a.snapshot().layers] == [5, 5]
    torch._dynamo.reset()
