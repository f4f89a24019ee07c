"""A small writer to be killed at any moment: it imports `_C` and nothing else of the package.

    python writer_process.py PATH MAX_BYTES

A thread a lane records the layers in turn, for ever. What a pass holds follows from its lane, its
layer and its number alone, so that whoever reads the recording knows what must be in it.
"""

from __future__ import annotations

import json
import sys
import threading
from array import array
from typing import NamedTuple

from dodoco_ext import _C

LANES = 3
PERIOD = 16  # after so many passes of a layer in a lane, they repeat


class Layer(NamedTuple):
    num_experts: int
    top_k: int
    tokens: int  # at least


# The first one has passes of padding only. The second one is wide, so that publishing a pass takes a
# while, and its passes are large enough to run without the interpreter lock: several lanes are in
# the middle of one at once.
LAYERS = (Layer(8, 2, 0), Layer(8192, 2, 9000), Layer(512, 4, 3))


class Pass(NamedTuple):
    """All tokens of a pass go to the same experts; the rows after them are padding."""

    experts: tuple[int, ...]
    tokens: int
    padding: int


def make_pass(lane: int, layer: int, number: int) -> Pass:
    num_experts, top_k, tokens = LAYERS[layer]
    number %= PERIOD
    first = 5 * number + 3 * lane
    experts = tuple((first + slot) % num_experts for slot in range(top_k))
    return Pass(experts, tokens + (number + lane) % 7, 1 + number % 3)


def make_ids(each: Pass) -> array[int]:
    """Ids [tokens + padding, k] of a pass."""
    top_k = len(each.experts)
    return array("h", each.experts) * each.tokens + array("h", [-1]) * top_k * each.padding


def record(writer: _C.RecordingWriter, lane: int) -> None:
    sites = [array("Q", bytes(_C.SITE_BYTES)) for _ in LAYERS]
    arguments = []
    for layer, site in enumerate(sites):
        writer.bind_site(site.buffer_info()[0], lane, layer)
    passes = [
        (make_pass(lane, layer, number), sites[layer])
        for number in range(PERIOD)
        for layer in range(len(LAYERS))
    ]
    kept = [make_ids(each) for each, _ in passes]
    for (each, site), ids in zip(passes, kept, strict=True):
        k = len(each.experts)
        arguments.append((site.buffer_info()[0], ids.buffer_info()[0], 2, len(ids) // k, k, k, 1))
    while True:
        for known in arguments:
            if _C.route_ids(*known, False) != 0:
                raise SystemExit("a pass was not recorded")


def main() -> None:
    path, max_bytes = sys.argv[1:]
    names = [{"name": f"layers.{index}"} for index in range(len(LAYERS))]
    lanes = [f"lane {index}" for index in range(LANES)]
    metadata = json.dumps({"layers": names, "lanes": lanes, "run": "killed"})
    shapes = [(layer.num_experts, layer.top_k) for layer in LAYERS]
    writer = _C.RecordingWriter(path, metadata, shapes, num_lanes=LANES, max_bytes=int(max_bytes))
    for lane in range(1, LANES):
        threading.Thread(target=record, args=(writer, lane), daemon=True).start()
    record(writer, 0)


if __name__ == "__main__":
    main()
