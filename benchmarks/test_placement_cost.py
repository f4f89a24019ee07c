"""What recording a change of placements costs the host: 61 layers of 288 slots."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recorder import LayerSpec, Recorder

from .figures import Figures
from .interleave import Summary

LAYERS, EXPERTS, SLOTS, RANKS = 61, 256, 288, 32
LIMIT_S = 0.005


def test_a_change_of_every_layer(figures: Figures, recordings: Path) -> None:
    names = [LayerSpec(f"layers.{i}", EXPERTS, 8) for i in range(LAYERS)]
    rng = np.random.default_rng(0)
    slots = np.arange(SLOTS) % EXPERTS
    table = figures.table(
        f"a change of {LAYERS} layers of {SLOTS} slots", ("lanes", "ms (p20/p50/p80)")
    )
    for lanes in (1, 3):
        recorder = Recorder(names, placements=PlacementSpec(SLOTS), lanes=lanes)
        taken = []
        for _ in range(figures.blocks(200)):
            maps = {layer: rng.permutation(slots) for layer in range(LAYERS)}
            begin = time.perf_counter()
            recorder.record_placement(maps, RANKS)
            taken.append(time.perf_counter() - begin)
        recorder.close()
        cost = Summary.of(np.array(taken))
        values = " / ".join(f"{value * 1e3:.2f}" for value in (cost.p20, cost.p50, cost.p80))
        table.rows.append((str(lanes), values))
        figures.judge(f"placement/{lanes} lanes", cost, LIMIT_S, slack=2 * LIMIT_S)
