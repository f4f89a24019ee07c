"""Pipelines under Megatron's own schedules: stages without MoE, virtual stages, MTP, reduced metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dodoco_ext
from megatron_processes import needs_megatron, run_ranks

pytestmark = [pytest.mark.engine, needs_megatron, pytest.mark.timeout(300)]

STEPS, MICROBATCHES, ASSIGNMENTS = 2, 4, 64  # of a pass: two sequences of 16 tokens, top 2


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    script = Path(__file__).with_name("megatron_pipeline_job.py")
    return {
        chunks: run_ranks(script, 2, tmp_path_factory.mktemp(f"vpp{chunks}"), str(chunks))
        for chunks in (1, 2)
    }


def test_layers_carry_their_number_in_the_whole_model_and_their_chunk(jobs: Any) -> None:
    assert jobs[1][1]["layers"] == [
        "decoder.layers.2.mlp.router",
        "decoder.layers.3.mlp.router",
        "mtp.layers.0.transformer_layer.mlp.router",
    ]
    assert jobs[2][0]["layers"] == ["chunk1.decoder.layers.2.mlp.router"]
    assert jobs[2][1]["layers"] == [
        "chunk0.decoder.layers.1.mlp.router",
        "chunk1.decoder.layers.3.mlp.router",
    ]


def test_a_stage_without_moe_says_so_and_goes_on(jobs: Any) -> None:
    assert jobs[1][0]["layers"] == []
    reason = "no MoE layer is on this pipeline stage"
    assert jobs[1][0]["uncovered"] == [("this rank", reason)]
    assert jobs[2][0]["uncovered"] == [("chunk0", reason)]
    assert jobs[1][1]["uncovered"] == []
    reader = dodoco_ext.Reader(jobs[1][0]["path"])
    assert reader.metadata["uncovered"] == [{"name": "this rank", "reason": reason}]
    assert reader.snapshot().layers[0].passes == 0


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_layer_counts_every_micro_batch(jobs: Any, chunks: int) -> None:
    for said in jobs[chunks]:
        if said["layers"]:
            for counts in said["counts"]:
                assert counts.sum() == STEPS * MICROBATCHES * ASSIGNMENTS


def test_passes_carry_the_schedules_micro_batch(jobs: Any) -> None:
    records = dodoco_ext.Reader(jobs[1][1]["path"]).records()
    for layer in range(3):
        seen = records["microbatch"][records["layer"] == layer].tolist()
        assert seen == list(range(MICROBATCHES)) * (STEPS + 1)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_reduction_adds_the_layers_of_all_stages(jobs: Any, chunks: int) -> None:
    first, last = (said["group"] for said in jobs[chunks])
    assert first == last
    layers = {1: (2, 3, 4), 2: (1, 2, 3)}[chunks]
    per_layer = [last[f"moe/group_gini_layer_{number}"] for number in layers]
    assert not any(f"moe/group_gini_layer_{n}" in last for n in range(6) if n not in layers)
    assert last["moe/group_gini_max"] == max(per_layer)
    assert last["moe/group_gini_p50"] == np.median(per_layer)
    # Every micro-batch of that step was the same token again and again.
    assert all(0.3 < value < 1 for value in per_layer)


@pytest.mark.parametrize("chunks", [1, 2])
def test_one_rank_writes_and_a_window_without_passes_is_empty(jobs: Any, chunks: int) -> None:
    assert [said["empty"] for said in jobs[chunks]] == [{}, {}]
    assert jobs[chunks][0]["scalars"] == {}
    assert jobs[chunks][1]["scalars"] == jobs[chunks][1]["group"]


def test_a_group_of_one_stage_equals_what_its_ranks_count(jobs: Any) -> None:
    records = dodoco_ext.Reader(jobs[1][1]["path"]).records()
    mine = records[(records["layer"] == 0)][-MICROBATCHES:]
    # max/mean of equal passes is that of their sum.
    expected = 8 * mine["max_count"].astype(float) / mine["assignments"]
    assert np.allclose(jobs[1][1]["group"]["moe/group_max_over_mean_layer_2"], expected)
