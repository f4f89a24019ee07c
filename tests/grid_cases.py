"""Small grids for the tests: planted cells, and the real command at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.sampling import sample_counts
from observatory_cases import TEXT

DRAWS, SEQUENCES, LAYERS, EXPERTS, TOP_K, TOKENS = 2, 64, 2, 32, 4, 64


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """The command line of six cells of 32 sequences each, on a text that is written to `folder`."""
    text = folder / "fox.txt"
    if not text.exists():
        text.write_text(TEXT)
    return [
        *(sys.executable, "-m", "dodoco_ext", "observe", "--preset", "grid"),
        *("--model", "zoo:mla", "--model", "zoo:gqa"),
        *("--data", "mock-uniform", "--data", f"shuffled:{text}", "--data", str(text)),
        *("--batch-size", "2", "--sequence-length", "16", "--num-batches", "8", "--seeds", "2"),
        *("--out", str(out), *more),
    ]


def observe_grid(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        command(folder, out, *more), capture_output=True, text=True, timeout=300, check=False
    )


def planted(log_weights: NDArray[np.float64] | None, **changed: Any) -> Cell:
    """A cell whose tokens are routed independently of each other, by these weights [E] (None: uniformly)."""
    rng = np.random.default_rng(5)
    number = DRAWS * SEQUENCES * LAYERS
    counts = sample_counts(rng, TOKENS, EXPERTS, TOP_K, number, log_weights)
    return cell(counts.reshape(DRAWS, SEQUENCES, LAYERS, EXPERTS), **changed)


def cell(counts: NDArray[np.int64], **changed: Any) -> Cell:
    """A cell of these counts [draws, sequences, layers, experts]."""
    given: dict[str, Any] = {
        "model": "planted",
        "name": "text",
        "kind": "real",
        "source": "text",
        "description": "planted routing",
        "counts": counts.astype(np.int32),
        "losses": np.full(counts.shape[:2], 2.0),
        "top_k": [TOP_K] * counts.shape[2],
        "layer_names": [f"layers.{n}.gate" for n in range(counts.shape[2])],
        "key": {"model": "planted", "seed": 0, "shape": {"sequence_length": TOKENS}},
        "facts": {},
    }
    return Cell(**{**given, **changed})
