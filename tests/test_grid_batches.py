"""Counts of a batch are the sums of its sequences' counts, in every architecture of the zoo.

True by construction of dropless, teacher-forced evaluation; here real passes of both kinds show that
nothing in between (padding, caches, grouped kernels, the recording) breaks it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dodoco_ext.observatory.conditions import ConditionBuilder, Shape
from dodoco_ext.observatory.grid.acquire import one_by_one
from dodoco_ext.observatory.grid.passes import passes_of
from dodoco_ext.observatory.models import LoadedModel, load_model, quiet
from dodoco_ext.observatory.resident import Streamed
from dodoco_ext.observatory.runners import Runner
from dodoco_ext.observatory.streamed import StreamedModel
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo.shipped import model_folder
from dodoco_ext.observatory.zoo.species import SPECIES

pytest.importorskip("transformers")

SHAPE = Shape(batch_size=16, sequence_length=32, num_batches=2)


def counts_of_passes(runner: Runner, ids: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
    """What the recording counted in each pass [passes, layers, experts]."""
    batches = [{"input_ids": batch} for batch in torch.from_numpy(ids).split(shape.batch_size)]
    with one_thread(), quiet(), runner.attach("m") as recorded:
        recorded.record_every = 1
        window, _ = runner.run_passes(recorded, batches, shape, lambda done, total: None)
        window.check()
    return np.array(window.counts)


def ids_for(loaded: LoadedModel) -> NDArray[np.int64]:
    return ConditionBuilder(loaded.tokenizer, SHAPE, 3).build(["builtin:code"])[0].ids


@pytest.mark.parametrize("name", SPECIES)
def test_real_batches_count_what_their_sequences_count(name: str) -> None:
    loaded = load_model(f"zoo:{name}")
    ids = ids_for(loaded)
    singles = counts_of_passes(loaded.runner, ids, one_by_one(SHAPE, len(ids)))
    for size in (2, 4, 8, 16):
        shape = replace(SHAPE, batch_size=size, num_batches=len(ids) // size)
        regrouped = passes_of(singles[None].astype(np.int32), size)
        assert np.array_equal(counts_of_passes(loaded.runner, ids, shape), regrouped), size


def test_so_do_batches_without_first_positions() -> None:
    loaded = load_model("zoo:gqa")
    ids, shape = ids_for(loaded), replace(SHAPE, first_position=False)
    singles = counts_of_passes(loaded.runner, ids, one_by_one(shape, len(ids)))
    assert singles.sum() == ids[:, 1:].size * singles.shape[1] * 4
    whole = counts_of_passes(loaded.runner, ids, shape)
    assert np.array_equal(whole, passes_of(singles[None].astype(np.int32), 16))


@pytest.mark.parametrize("first_position", [True, False])
def test_so_does_a_streamed_model(first_position: bool) -> None:
    loaded = load_model("zoo:mla")
    folder: Path = model_folder("mla")
    ids, shape = ids_for(loaded)[:4], replace(SHAPE, first_position=first_position)
    single = one_by_one(shape, len(ids))
    with quiet():
        streamed = Streamed(StreamedModel(folder, torch.float32))
    assert np.array_equal(
        counts_of_passes(streamed, ids, single), counts_of_passes(loaded.runner, ids, single)
    )
