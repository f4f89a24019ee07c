"""Runs docs/examples/megatron_moe.py on a CPU: the stand-ins first, then the script as it is.

Arguments: rank, ranks, folder, and those of the script. Run by test_megatron_example.py.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent)]
import megatron_cpu  # noqa: F401

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "megatron_moe.py"

rank, ranks, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": rank}
torch.set_num_threads(1)
sys.argv = [str(EXAMPLE), "--tensorboard", str(folder / "board"), *sys.argv[4:]]
runpy.run_path(str(EXAMPLE), run_name="__main__")
torch.save({"rank": int(rank)}, folder / f"{rank}.pt")
