"""Grids with planted routing, as a results folder holds them, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory.ep_scan import ep_scan
from dodoco_ext.observatory.grid import findings, gaps
from dodoco_ext.observatory.grid.batch_scan import batch_scan
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.figures import Analysed, analyse
from dodoco_ext.observatory.grid.results import GridCondition, GridModel, Numbers, to_json
from dodoco_ext.sampling import sample_counts

CONDITIONS = (
    ("uniform mock", "mock", "mock-uniform", 2.0),
    ("unigram <mock>", "mock", "mock-unigram:packaged:english", 0.7),
    ("shuffled english", "control", "shuffled:packaged:english", 0.8),
    ("english", "real", "packaged:english", 1.0),
    ("dialogue", "real", "packaged:dialogue", 0.9),
    ("bulgarian", "real", "packaged:bulgarian", 1.5),
)
"""Name, kind, source, and how much stronger than on English the router's preferences are."""

WHOLE, PART = "zoo:mha", "R&D_<model>"
"""One model has every condition; the other two only, no batch scan, and 24 experts: no EP 16 and 32."""

_MODELS = {WHOLE: (32, 0.25, range(len(CONDITIONS))), PART: (24, 0.9, (0, 3))}

DRAWS, SEQUENCES, LAYERS, TOP_K, TOKENS, BATCH = 2, 32, 2, 4, 32, 4


def planted_numbers(*models: str, conditions: Collection[int] = range(len(CONDITIONS))) -> Numbers:
    """A grid of models by conditions with known preferences."""
    rows = [
        [_cell(model, number) for number in _MODELS[model][2] if number in conditions]
        for model in models
    ]
    analysed = [[_analysed(cell) for cell in row] for row in rows]
    numbers = Numbers(
        parameters={
            "seed": 0,
            "num_draws": DRAWS,
            "batch_size": BATCH,
            "sequence_length": TOKENS,
            "num_ranks": 8,
        },
        models=[
            GridModel(name, "Planted", 1000, 512, LAYERS, _MODELS[name][0], [TOP_K] * LAYERS, [])
            for name in models
        ],
        conditions=[
            GridCondition(*CONDITIONS[number][:3], "planted") for number in sorted(conditions)
        ],
        cells=[one.cell for row in analysed for one in row],
        ratios=[ratio for row in analysed for ratio in gaps.ratios(row)],
        gaps=[gap for row in analysed for gap in gaps.gaps(row)],
        batch_scans=[batch_scan(cell, 0) for cell in rows[0] if cell.model == WHOLE],
    )
    numbers.findings.extend(findings.findings(numbers))
    return numbers


def write_grid(folder: Path, numbers: Numbers) -> Path:
    """A results folder with that grid."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"grid": {"python": "3", "machine": "Linux x86_64, 2 CPU cores"}, "seconds": 1.0}
    (folder / "grid.json").write_text(to_json(numbers, provenance), encoding="utf-8")
    return folder


def _cell(model: str, number: int) -> Cell:
    experts, strength, _ = _MODELS[model]
    name, kind, source, factor = CONDITIONS[number]
    rng = np.random.default_rng([experts, number])
    preferences: NDArray[np.float64] = np.random.default_rng(experts).normal(size=(LAYERS, experts))
    counts = np.stack(
        [
            sample_counts(
                rng,
                TOKENS,
                experts,
                TOP_K,
                DRAWS * SEQUENCES,
                strength * factor * preferences[layer],
            )
            for layer in range(LAYERS)
        ],
        axis=1,
    )
    return Cell(
        model=model,
        name=name,
        kind=kind,
        source=source,
        description="planted",
        counts=counts.reshape(DRAWS, SEQUENCES, LAYERS, experts).astype(np.int32),
        losses=np.full((DRAWS, SEQUENCES), 2.5),
        top_k=[TOP_K] * LAYERS,
        layer_names=[f"layers.{layer}.gate" for layer in range(LAYERS)],
        key={"shape": {"sequence_length": TOKENS}},
        facts={},
    )


def _analysed(cell: Cell) -> Analysed:
    found = analyse(cell, f"{cell.name}.npz", BATCH, 8, 0)
    scan = ep_scan(
        cell.counts,
        cell.top_k,
        model=cell.model,
        condition=cell.name,
        sequences_per_pass=BATCH,
        num_placements=100,
    )
    return replace(found, cell=replace(found.cell, ep_scan=scan))
