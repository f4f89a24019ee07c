"""The kernel in CUDA graphs against other ways to count, by shape, size and skew."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dodoco_ext import reference
from dodoco_ext.recording import Reader

from .contestants import Counting, Layers
from .device_timing import capture, interleave_graphs
from .place import Place, find_place, recordings_in_memory
from .results import Results

SHAPES = ((8, 2), (60, 4), (64, 6), (128, 8), (256, 8), (384, 8), (512, 10))
NUM_TOKENS = (1, 8, 32, 128, 512, 4096, 16384, 65536)
SKEWS = ("uniform", "zipf")
ROUNDS = 60
ESSENTIAL = ("empty node", "record")


def main(dry: bool, effort: float, results: Results) -> int:
    """Measures the cells that are not measured yet. Returns 1 if a recording was wrong."""
    place = find_place(dry, results)
    if place is None:
        return 0
    rounds = max(10, round(ROUNDS * effort))
    with recordings_in_memory():
        layers = Layers(place)
        try:
            # The sizes that serve first: what time is left goes to the others.
            for num_tokens in NUM_TOKENS[1:3] if dry else NUM_TOKENS:
                for num_experts, top_k in SHAPES[:2] if dry else SHAPES:
                    for skew in SKEWS:
                        name = f"{num_experts} experts, k {top_k}/{num_tokens} tokens/{skew}"
                        if name not in results:
                            cell = measure(
                                place, layers, num_tokens, num_experts, top_k, skew, rounds
                            )
                            results.put(name, cell)
                            print(name, flush=True)
        finally:
            place.cuda.synchronize()
            layers.close()
    cells = [cell for cell in results.values.values() if isinstance(cell, dict)]
    wrong = [cell for cell in cells if not cell["exact"]]
    results.put("summary", f"{len(cells)} cells, {len(wrong)} of them with wrong counts")
    return 1 if wrong else 0


def nodes_for(num_tokens: int, dry: bool) -> int:
    """Calls in a graph: many where one is short."""
    if dry:
        return 8
    return 40 if num_tokens <= 512 else 20 if num_tokens <= 4096 else 8


def measure(
    place: Place,
    layers: Layers,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    skew: str,
    rounds: int,
) -> dict[str, Any]:
    """One cell: seconds a call and ratios, and whether what was recorded is exact."""
    site = layers.site(num_experts, top_k)
    counting = Counting(place, num_tokens, num_experts, top_k, zipf=skew == "zipf", site=site)
    nodes = nodes_for(num_tokens, place.dry)
    stream = place.cuda.Stream()
    with layers.recorder(num_experts, top_k).use_lane(0):
        graphs, left_out = {}, {}
        for name, run in counting.ways().items():
            try:
                graphs[name] = capture(place, run, nodes, stream)
            except RuntimeError as error:  # what this torch cannot capture is no reason to stop
                if name in ESSENTIAL:
                    raise
                left_out[name] = str(error).partition("\n")[0]
    exact = is_exact(place, layers, counting, graphs["record"], num_experts, top_k, nodes)
    timings = interleave_graphs(place, graphs, rounds=rounds, nodes=nodes)
    cell: dict[str, Any] = {"exact": exact, "nodes": nodes, "left out": left_out}
    cell["seconds"] = {name: asdict(timings.time(name)) for name in graphs}
    over = timings.difference("record", "empty node")
    cell["record over empty node"] = asdict(over)
    cell["record over"] = {
        name: asdict(timings.ratio("record", name)) for name in graphs if name != "record"
    }
    return cell


def is_exact(
    place: Place,
    layers: Layers,
    counting: Counting,
    graph: Any,
    num_experts: int,
    top_k: int,
    nodes: int,
) -> bool:
    """Whether one replay adds to the recording exactly what its passes hold."""
    reader = Reader(layers.recorder(num_experts, top_k).path)
    place.cuda.synchronize()
    before = reader.snapshot()
    graph.replay()
    place.cuda.synchronize()
    (layer,) = (reader.snapshot() - before).layers
    # The graph holds `nodes` passes, taken in turn, from wherever warming up had come to.
    counts = [reference.route_ids(ids.cpu().numpy(), num_experts).counts for ids in counting.ids]
    possible = [
        sum(counts[(first + number) % len(counts)] for number in range(nodes))
        for first in range(len(counts))
    ]
    return layer.passes == nodes and any(np.array_equal(layer.counts, each) for each in possible)
