"""Eager launches: what the host spends on a call, and what the device does when calls queue up."""

from __future__ import annotations

from dataclasses import asdict

import torch

from benchmarks.interleave import Contestant, interleave

from .contestants import Counting, Layers
from .device_timing import MAX_QUEUED, queued
from .place import find_place, recordings_in_memory
from .results import Results

SHAPES = ((64, 6), (128, 8), (512, 10))
NUM_TOKENS = (1, 32, 4096)
HOST_ROUNDS, DEVICE_ROUNDS = 300, 40


def main(dry: bool, effort: float, results: Results) -> int:
    """Measures what is not measured yet."""
    place = find_place(dry, results)
    if place is None:
        return 0
    library = torch.library.Library("dodoco_gpu_check", "DEF")
    library.define("empty(Tensor ids, Tensor(a!) site) -> ()")
    library.impl("empty", lambda ids, site: None, "CPU" if dry else "CUDA")
    library.impl("empty", torch.library.fallthrough_kernel, "Autograd")
    empty = torch.ops.dodoco_gpu_check.empty.default
    synchronize = place.cuda.synchronize
    host_rounds = max(10, round(HOST_ROUNDS * effort))
    device_rounds = max(10, round(DEVICE_ROUNDS * effort))
    with recordings_in_memory(), torch.no_grad():
        layers = Layers(place)
        try:
            for num_experts, top_k in SHAPES[:1] if dry else SHAPES:
                for num_tokens in NUM_TOKENS[:2] if dry else NUM_TOKENS:
                    name = f"{num_experts} experts, k {top_k}/{num_tokens} tokens"
                    if name in results:
                        continue
                    site = layers.site(num_experts, top_k)
                    counting = Counting(
                        place, num_tokens, num_experts, top_k, zipf=False, site=site
                    )
                    ids = counting.ids[0]
                    device = {
                        "record, as a probe does": counting.record_directly,
                        "record, as an op": counting.record,
                        "empty Triton kernel": counting.nothing,
                        "scatter_add chain": counting.scatter_add_chain,
                        "histc": counting.histc,
                    }
                    host = {
                        **device,
                        "empty op": lambda ids=ids, site=site: empty(ids, site),
                        "bincount (waits)": counting.bincount,
                    }
                    for run in host.values():
                        run()
                    timings = interleave(
                        {key: Contestant(run, synchronize) for key, run in host.items()},
                        num_blocks=host_rounds,
                        calls=dict.fromkeys(host, 10 if dry else 100),
                    )
                    on_device = queued(place, device, rounds=device_rounds, calls=MAX_QUEUED)
                    cell = {
                        "host seconds": {key: asdict(timings.time(key)) for key in host},
                        "device seconds": {key: asdict(on_device.time(key)) for key in device},
                    }
                    results.put(name, cell)
                    print(name, flush=True)
        finally:
            synchronize()
            layers.close()
    results.put("summary", f"{sum(isinstance(v, dict) for v in results.values.values())} cells")
    return 0
