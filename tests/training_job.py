"""A training job of several processes for `torchrun`: an AlltoAll a layer and back, until it is killed.

    python -m torch.distributed.run --nproc-per-node N training_job.py FOLDER ITERATION

Rank 1 stops dead before the combine of layer 1 in iteration ITERATION, and says so by the file
FOLDER/stopped; the others then wait for it for ever. Every rank leaves its PID in FOLDER.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dodoco_ext.capture import COMBINE, DISPATCH, Capture
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 16


def main() -> None:
    folder, stops = Path(sys.argv[1]), int(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    specs = [
        LayerSpec(f"model.layers.{i}.mlp", EXPERTS, TOP_K, routed=False) for i in range(LAYERS)
    ]
    recorder = Recorder(specs, group=GroupSpec(tuple(range(size)), rank))
    capture = Capture(recorder, advances=True)
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    torch.manual_seed(rank)
    # Expert 3 is twice as popular.
    popularity = torch.ones(EXPERTS)
    popularity[3] = 3.0
    local = EXPERTS // size
    for iteration in range(1_000_000):
        for layer in range(LAYERS):
            ids = torch.multinomial(popularity.expand(TOKENS, -1), TOP_K).reshape(-1)
            counts = torch.bincount(ids, minlength=EXPERTS)
            send = counts.reshape(size, local).sum(1).tolist()
            theirs = torch.empty_like(counts)
            dist.all_to_all_single(theirs, counts)
            by_source = theirs.reshape(size, local)
            receive, experts = by_source.sum(1).tolist(), by_source.sum(0).tolist()
            rows = torch.zeros(len(ids), 4)
            got = torch.empty(sum(receive), 4)
            transfer = capture.begin(layer, DISPATCH)
            dist.all_to_all_single(got, rows, receive, send)
            capture.end(transfer, send, receive, experts=experts, bytes_per_row=16)
            if rank == 1 and (iteration, layer) == (stops, 1):
                (folder / "stopped").touch()
                time.sleep(3600)
            transfer = capture.begin(layer, COMBINE)
            dist.all_to_all_single(rows, got, send, receive)
            capture.end(transfer, receive, send, bytes_per_row=16)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
