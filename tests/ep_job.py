"""Real processes over gloo that dispatch given expert choices: one AlltoAll a layer, captured.

As a program: `ep_job.py FOLDER RANKS`. FOLDER holds `ids.npy`, expert choices [sequences, layers, tokens, k]
of a model of NUM_EXPERTS experts; rank r holds the sequences r, r + RANKS, ... Each rank writes `rank-N.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_EXPERTS = 64


def run(folder: Path, ids: NDArray[np.int64], ranks: int, timeout_s: float = 180) -> list[Path]:
    """Dispatches the choices over that many processes; returns each rank's recording."""
    np.save(folder / "ids.npy", ids)
    program = subprocess.run(
        [sys.executable, str(Path(__file__)), str(folder), str(ranks)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert program.returncode == 0, program.stderr[-4000:]
    return [Path(json.loads((folder / f"rank-{rank}.json").read_text())) for rank in range(ranks)]


def dispatch(folder: Path, rank: int, ranks: int) -> str:
    """What one rank does: for each layer, tell the others how many rows come, and send them."""
    import torch
    import torch.distributed as dist

    import dodoco_ext as dodoco

    ids = torch.from_numpy(np.load(folder / "ids.npy")[rank::ranks])
    num_layers = ids.shape[1]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    capture = dodoco.capture_alltoall(layers=num_layers, num_experts=NUM_EXPERTS)
    for layer in range(num_layers):
        experts = ids[:, layer].flatten().sort().values
        owners = experts // (NUM_EXPERTS // ranks)
        sent = torch.bincount(owners, minlength=ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        # A row says which expert it is for, so that the receiver can check that it owns it.
        rows = experts.float().unsqueeze(1)
        arrived = rows.new_empty(int(received.sum()), 1)
        with capture.layer(layer):
            dist.all_to_all_single(arrived, rows, received.tolist(), sent.tolist())
            # The way back of a real layer: the same rows return.
            back = rows.new_empty(len(rows), 1)
            dist.all_to_all_single(back, arrived, sent.tolist(), received.tolist())
        assert (arrived.flatten().long() // (NUM_EXPERTS // ranks) == rank).all()
        assert torch.equal(back, rows)
    path = str(capture.path)
    capture.close()
    dist.barrier()
    dist.destroy_process_group()
    return path


def main() -> int:
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    import dodoco_ext.integrations.distributed  # noqa: F401 - imported once, for all ranks
    from forked_ranks import run_ranks

    torch.set_num_threads(1)
    return run_ranks(ranks, folder, lambda rank: dispatch(folder, rank, ranks))


if __name__ == "__main__":
    sys.exit(main())
