"""Models on the second device, on several, and moved from one to the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import _C
from toy import ToyModel, assert_recorded, some_tokens

pytestmark = pytest.mark.gpu

TOKENS = some_tokens()


@pytest.fixture
def two(cuda: Any) -> None:
    if cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; torch finds {cuda.device_count()}")


def test_the_second_device_while_the_first_is_current(two: None, cuda: Any) -> None:
    twin, model = ToyModel(), ToyModel().to("cuda:1").eval()
    there = TOKENS.to("cuda:1")
    with dodoco.attach(model) as a, torch.no_grad():
        model(there)
        with cuda.device(1):
            model(there)
            stream, graph = cuda.Stream(device=1), cuda.CUDAGraph()
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                model(there)
            stream.synchronize()
            with cuda.graph(graph, stream=stream):
                model(there)
            graph.replay()
        cuda.synchronize(1)
        assert_recorded(a, twin, [TOKENS] * 4)
        assert a.reader.metadata["lanes"] == ["cuda:1", "cuda:1 1"]


def test_one_model_on_two_devices_and_the_host(two: None, cuda: Any) -> None:
    twin, model = ToyModel(), ToyModel().eval()
    model.layers[0].to("cuda:0")
    model.layers[1].to("cuda:1")
    hidden = model.embedding(TOKENS)
    with dodoco.attach(model) as a, torch.no_grad():
        for layer, place in zip(model.layers, ("cuda:0", "cuda:1", "cpu"), strict=True):
            hidden = layer(hidden.to(place), TOKENS.to(place))
        cuda.synchronize(0)
        cuda.synchronize(1)
        assert_recorded(a, twin, [TOKENS])


def test_a_model_that_moves_to_the_device_after_attach_is_told(
    place: str, cuda: Any, driver_decides: None
) -> None:
    model = ToyModel().eval()
    with dodoco.attach(model) as a, torch.no_grad():
        model(TOKENS)
        model.to(place)
        model(TOKENS.to(place))
        cuda.synchronize()
        assert [layer.passes for layer in a.snapshot().layers] == [1] * len(model.layers)
        assert a.reader.header["last_fault"] == int(_C.Fault.COPIED_SITE)
