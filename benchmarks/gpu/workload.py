"""Small cases of every kernel, with their counts checked: what compute-sanitizer runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dodoco_ext import ops, reference
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader

from .place import Place, find_place, recordings_in_memory
from .results import Results

SHAPES = ((8, 2), (60, 4), (128, 8), (512, 10))
ROWS = (0, 1, 33, 2100)
COUNTERS = ("tokens", "assignments", "padded", "invalid", "capacity_dropped")


def main(dry: bool, effort: float, results: Results) -> int:
    """Records the cases. Returns 1 if a count is wrong."""
    place = find_place(dry, results)
    if place is None:
        return 0
    with recordings_in_memory():
        wrong = [
            f"{num_experts} experts, k {top_k}: {what}"
            for num_experts, top_k in SHAPES
            for what in run_cases(place, num_experts, top_k)
        ]
    print("\n".join(wrong) or f"{len(SHAPES)} shapes, all counts are exact")
    return 1 if wrong else 0


def run_cases(place: Place, num_experts: int, top_k: int) -> Iterator[str]:
    """Ids of each width, byte maps and bit maps, small and shared; names what is wrong."""
    device = place.device
    recorder = Recorder([LayerSpec("router", num_experts, top_k)], devices=[device])
    if recorder.refused:
        yield f"refused: {recorder.refused}"
        return
    site = ops.make_site(recorder, 0, device)
    generator = np.random.default_rng(0)
    expected, kept = [], []
    for rows in ROWS:
        ids = generator.integers(-1, num_experts + 1, (rows, top_k))
        for dtype in (np.int16, np.int32, np.int64):
            kept.append(torch.from_numpy(ids.astype(dtype)).to(device))
            ops.route_ids(kept[-1], site)
            expected.append(reference.route_ids(ids, num_experts))
        chosen = generator.random((rows, num_experts)) < top_k / num_experts
        kept.append(torch.from_numpy(chosen).to(device))
        ops.route_map(kept[-1], site)
        expected.append(reference.route_map(chosen, num_experts, top_k))
        packed = np.packbits(chosen, axis=1, bitorder="little")
        kept.append(torch.from_numpy(packed).to(device))
        ops.route_bits(kept[-1], site)
        expected.append(reference.route_map(packed, num_experts, top_k, packed=True))
    recorder.set("enabled", 0)
    ops.route_ids(kept[0], site)
    place.cuda.synchronize()
    (layer,) = Reader(recorder.path).snapshot().layers
    if layer.passes != len(expected):
        yield f"{layer.passes} passes of {len(expected)}"
    if not np.array_equal(layer.counts, sum(each.counts for each in expected)):
        yield "counts"
    for name in COUNTERS:
        if getattr(layer, name) != sum(getattr(each, name) for each in expected):
            yield name
    recorder.close()
    ops.release_site(site.data_ptr())
