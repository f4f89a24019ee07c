"""Passes inside CUDA graphs: every replay counts, settings are obeyed, a graph outlives its recorder."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext.errors import InputError
from toy import ToyModel, assert_recorded, some_tokens

pytestmark = pytest.mark.gpu

Capture = Callable[..., Any]


class Captured:
    """A model on the device, its twin on the CPU, and tokens that stay where they are."""

    def __init__(self, place: str, shape: tuple[int, ...] = (2, 9)) -> None:
        self.twin = ToyModel()
        self.model = ToyModel().to(place).eval()
        self.tokens = some_tokens(shape).to(place)
        self.output: torch.Tensor | None = None

    def run(self) -> None:
        with torch.no_grad():
            self.output = self.model(self.tokens)


@pytest.fixture
def captured(place: str) -> Captured:
    return Captured(place)


def test_a_thousand_replays_count_exactly(
    captured: Captured, cuda: Any, capture: Capture, often: int
) -> None:
    with dodoco.attach(captured.model) as a:
        with a.paused():
            graph = capture(captured.run, cuda.Stream())
        passes = []
        for number in range(often):
            passes.append(some_tokens((2, 9), seed=number % 50))
            captured.tokens.copy_(passes[-1])
            graph.replay()
        cuda.synchronize()
        assert_recorded(a, captured.twin, passes)
        records = a.reader.records()
        assert len(records) == often * len(captured.model.layers)
        assert a.reader.header["num_faults"] == 0


def test_replays_give_what_the_bare_model_gives(
    captured: Captured, cuda: Any, capture: Capture
) -> None:
    captured.run()
    bare = captured.output.clone()
    with dodoco.attach(captured.model):
        graph = capture(captured.run, cuda.Stream())
        graph.replay()
        cuda.synchronize()
        assert torch.equal(captured.output, bare)
    captured.run()
    assert torch.equal(captured.output, bare)


def test_capturing_again_leaves_both_graphs_exact(
    captured: Captured, place: str, cuda: Any, capture: Capture
) -> None:
    stream = cuda.Stream()
    with dodoco.attach(captured.model) as a:
        with a.paused():
            first, first_tokens = capture(captured.run, stream), captured.tokens
            captured.tokens = some_tokens((5, 3), seed=7).to(place)
            second = capture(captured.run, stream)
        for _ in range(3):
            first.replay()
            second.replay()
            first.replay()
        cuda.synchronize()
        small, large = captured.tokens.cpu(), first_tokens.cpu()
        assert_recorded(a, captured.twin, [large] * 6 + [small] * 3)


def test_settings_take_their_turn_between_replays(
    captured: Captured, cuda: Any, capture: Capture
) -> None:
    with dodoco.attach(captured.model) as a:
        a.enabled = False
        graph = capture(captured.run, cuda.Stream())
        # Nothing waits in between: the order of the stream is all there is.
        graph.replay()
        a.enabled = True
        graph.replay()
        a.num_valid = 5
        graph.replay()
        a.num_valid = None
        a.record_every = 1000
        graph.replay()
        a.enabled = False
        graph.replay()
        cuda.synchronize()
        layers = a.snapshot().layers
        assert [layer.passes for layer in layers] == [3] * len(layers)
        assert [layer.tokens for layer in layers] == [18 + 5 + 18] * len(layers)
        assert [layer.padded for layer in layers] == [13 * 2] * len(layers)
        records = a.reader.records()
        assert records["tokens"].tolist().count(5) == len(layers)
        assert len(records) == 2 * len(layers)


def test_a_setting_is_refused_while_its_stream_is_captured(
    captured: Captured, cuda: Any, capture: Capture, driver_decides: None
) -> None:
    with dodoco.attach(captured.model) as a:
        stream, graph = cuda.Stream(), cuda.CUDAGraph()
        with a.paused():
            capture(captured.run, stream)
        with cuda.graph(graph, stream=stream):
            captured.run()
            with pytest.raises(InputError, match="enabled cannot be set now"):
                a.enabled = False
        assert a.enabled
        graph.replay()  # the refusal left the capture whole
        cuda.synchronize()
        assert_recorded(a, captured.twin, [captured.tokens.cpu()])


def test_a_graph_outlives_its_recorder(captured: Captured, cuda: Any, capture: Capture) -> None:
    a = dodoco.attach(captured.model)
    with a.paused():
        graph = capture(captured.run, cuda.Stream())
    graph.replay()
    cuda.synchronize()
    expected = captured.output.clone()
    assert_recorded(a, captured.twin, [captured.tokens.cpu()])
    a.detach()
    path, closed = a.path, a.path.read_bytes()
    assert a.reader.state == "closed"
    del a
    gc.collect()
    for _ in range(10):
        captured.output.zero_()
        graph.replay()
    cuda.synchronize()
    assert torch.equal(captured.output, expected), "the graph runs on as if nobody had been there"
    assert path.read_bytes() == closed, "a detached graph writes nothing"


def test_a_second_recorder_does_not_hear_the_first_ones_graph(
    captured: Captured, cuda: Any, capture: Capture
) -> None:
    stream = cuda.Stream()
    with dodoco.attach(captured.model):
        old = capture(captured.run, stream)
    with dodoco.attach(captured.model) as a:
        with a.paused():
            new = capture(captured.run, stream)
        old.replay()
        new.replay()
        old.replay()
        cuda.synchronize()
        assert_recorded(a, captured.twin, [captured.tokens.cpu()])
