"""Streams that run at the same time: each has a lane, and no count is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import _C, ops, reference
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from toy import ToyModel, assert_recorded, some_tokens

pytestmark = pytest.mark.gpu

E, K = 64, 6


@pytest.mark.parametrize("num_streams", [2, 4])
def test_streams_at_once_lose_nothing(place: str, cuda: Any, num_streams: int, often: int) -> None:
    layers = [LayerSpec("first", E, K), LayerSpec("second", E, K)]
    recorder = Recorder(layers, devices=[place], forms=["ids"], lanes=num_streams)
    sites = [ops.make_site(recorder, layer, place) for layer in range(2)]
    generator = torch.Generator().manual_seed(0)
    # Small and large passes in turn: one program, and several that meet in the lane's scratch.
    passes = [
        [torch.randint(0, E, (rows, K), generator=generator) for rows in (7, 9000, 1, 2500)]
        for _ in range(num_streams)
    ]
    there = [[ids.to(place) for ids in each] for each in passes]
    streams = [cuda.Stream() for _ in range(num_streams)]
    cuda.synchronize()
    for number in range(often):
        for stream, ids in zip(streams, there, strict=True):
            with cuda.stream(stream):
                for site in sites:
                    ops.route_ids(ids[number % 4], site)
    cuda.synchronize()
    expected = [reference.route_ids(ids.numpy(), E) for each in passes for ids in each]
    counts = sum(each.counts for each in expected) * (often // 4)
    reader = Reader(recorder.path)
    for layer in reader.snapshot().layers:
        np.testing.assert_array_equal(layer.counts, counts)
        assert layer.passes == often * num_streams
    if place != "cpu":
        records = reader.records()
        lanes, number = np.unique(records["lane"], return_counts=True)
        assert lanes.tolist() == list(range(num_streams)), "a lane for each stream"
        assert number.tolist() == [2 * often] * num_streams
    assert reader.header["num_faults"] == 0
    recorder.close()
    for site in sites:
        ops.release_site(site.data_ptr())


def test_graphs_of_two_streams_replayed_at_once(
    place: str, cuda: Any, capture: Any, often: int
) -> None:
    twin, model = ToyModel(), ToyModel().to(place).eval()
    tokens = [some_tokens((2, 9), seed=seed) for seed in (1, 2)]
    there = [each.to(place) for each in tokens]
    streams = [cuda.Stream(), cuda.Stream()]
    with dodoco.attach(model, lanes=2) as a, torch.no_grad():
        with a.paused():
            graphs = [
                capture(lambda each=each: model(each), stream)
                for each, stream in zip(there, streams, strict=True)
            ]
        cuda.synchronize()
        for _ in range(often):
            for graph, stream in zip(graphs, streams, strict=True):
                with cuda.stream(stream):
                    graph.replay()
        cuda.synchronize()
        assert_recorded(a, twin, [tokens[0]] * often + [tokens[1]] * often)
        for lane in range(2) if place != "cpu" else ():
            records = a.reader.records()
            iterations = records["iteration"][records["lane"] == lane]
            assert len(iterations) == often * len(model.layers)
            assert len(set(iterations.tolist())) == often


def test_a_stream_beyond_the_lanes_is_a_fault_and_the_model_runs_on(
    place: str, cuda: Any, driver_decides: None
) -> None:
    twin, model = ToyModel(), ToyModel().to(place).eval()
    tokens = some_tokens()
    there = tokens.to(place)
    streams = [cuda.Stream() for _ in range(3)]
    with dodoco.attach(model, lanes=2) as a, torch.no_grad():
        outputs = []
        for stream in streams:
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                outputs.append(model(there))
        cuda.synchronize()
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert_recorded(a, twin, [tokens] * 2)
        header = a.reader.header
        assert header["last_fault"] == int(_C.Fault.NO_LANE)
        assert header["num_faults"] == len(model.layers)


def test_a_chosen_lane_is_used_on_any_stream(place: str, cuda: Any, driver_decides: None) -> None:
    twin, model = ToyModel(), ToyModel().to(place).eval()
    tokens = some_tokens()
    there = tokens.to(place)
    with dodoco.attach(model, lanes=2) as a, torch.no_grad():
        for lane in (1, 0, 1):
            with a.lane(lane):
                model(there)
        cuda.synchronize()
        assert_recorded(a, twin, [tokens] * 3)
        lanes = a.reader.records()["lane"].tolist()
        assert (lanes.count(0), lanes.count(1)) == (len(model.layers), 2 * len(model.layers))
