"""Megatron-Core trains the same with and without probes, and every AlltoAll is recorded exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dodoco_ext
from dodoco_ext.transfers import COMBINE, DISPATCH
from megatron_processes import needs_megatron, run_ranks

pytestmark = [pytest.mark.engine, needs_megatron, pytest.mark.timeout(300)]

HIDDEN, EXPERTS, TOP_K, LAYERS = 32, 8, 2, 2
PASSES = 4  # two steps of two micro-batches
TOKENS = 32
CASES = ("none:alltoall", "moe:alltoall", "full:alltoall", "torch:alltoall")
MORE = ("none:allgather", "full:allgather", "none:alltoall:guarded", "full:alltoall:guarded")
BOTH = [(ranks, case) for ranks in (1, 2, 4) for case in (*CASES, *MORE)]


@dataclass
class Rank:
    """What one rank of a case said, and what its recording holds."""

    said: dict[str, Any]
    reader: dodoco_ext.Reader

    def transfers(self, **wanted: int) -> list[tuple[np.void, np.ndarray, np.ndarray, np.ndarray]]:
        found = self.reader.transfers()
        assert found.lost == 0
        return [
            (record, found.sent[i], found.received[i], found.experts[i])
            for i, record in enumerate(found.records)
            if all(record[name] == value for name, value in wanted.items())
        ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    script = Path(__file__).with_name("megatron_job.py")
    return {
        ranks: run_ranks(script, ranks, tmp_path_factory.mktemp(f"ep{ranks}"), *CASES, *MORE)
        for ranks in (1, 2, 4)
    }


@pytest.fixture
def job(jobs: dict[int, list[dict[str, Any]]], request: pytest.FixtureRequest) -> list[Rank]:
    ranks, case = request.param
    return [Rank(said[case], dodoco_ext.Reader(said[case]["path"])) for said in jobs[ranks]]


def of_cases(*pairs: tuple[int, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "job", pairs, indirect=True, ids=[f"ep{ranks}-{case}" for ranks, case in pairs]
    )


ALLTOALL = of_cases(*[(r, c) for r, c in BOTH if r > 1 and "alltoall" in c])


def matrices(job: list[Rank], layer: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows from each rank to each, and to each expert [R, E], by the maps that the routers returned."""
    to_expert = np.array([rank.said["maps"][layer][number].sum(0).numpy() for rank in job])
    return to_expert.reshape(len(job), len(job), -1).sum(2), to_expert


@of_cases(*BOTH)
def test_losses_and_gradients_are_bit_identical(job: list[Rank]) -> None:
    for rank in job:
        bare, probed = rank.said["losses"]
        assert all(torch.equal(a, b) for a, b in zip(bare, probed, strict=True))
        bare, probed = rank.said["gradients"]
        assert bare.keys() == probed.keys()
        assert any("router" in name for name in bare)
        assert all(torch.equal(bare[name], probed[name]) for name in bare)


@of_cases(*BOTH)
def test_routers_are_counted_once_whatever_is_recomputed(job: list[Rank]) -> None:
    for rank in job:
        for layer, counted in enumerate(rank.reader.snapshot().layers):
            maps = rank.said["maps"][layer]
            assert len(maps) == counted.passes == PASSES
            assert np.array_equal(counted.counts, sum(each.sum(0).numpy() for each in maps))
            assert counted.name == f"decoder.layers.{layer}.mlp.router"


@of_cases(*BOTH)
def test_detach_leaves_every_object_as_it_was(job: list[Rank]) -> None:
    assert all(rank.said["untouched"] for rank in job)


@of_cases(*BOTH)
def test_recordings_have_no_fault(job: list[Rank]) -> None:
    for rank in job:
        assert rank.reader.header["num_faults"] == 0
        assert rank.said["uncovered"] == []


@ALLTOALL
@pytest.mark.parametrize("recompute", [0, 1])
def test_forward_and_recomputed_transfers_are_exact(job: list[Rank], recompute: int) -> None:
    case = job[0].reader.metadata["labels"]["case"]
    recomputes = "none" not in case
    expected = [(it, layer) for it in range(PASSES) for layer in range(LAYERS)]
    if recompute and not recomputes:
        expected = []
    for index, rank in enumerate(job):
        mine = slice(index * EXPERTS // len(job), (index + 1) * EXPERTS // len(job))
        for op in (DISPATCH, COMBINE):
            found = rank.transfers(type=op, direction=0, recompute=recompute)
            seen = sorted((int(t["iteration"]), int(t["layer"])) for t, *_ in found)
            if op == COMBINE and recompute and "torch" in case:
                # That checkpoint stops once all that it saved is there: maybe before the combine.
                assert set(seen) <= set(expected)
            else:
                assert seen == expected
            for record, sent, received, experts in found:
                rows, to_expert = matrices(job, record["layer"], int(record["iteration"]))
                there, back = (rows[index], rows[:, index])
                if op == COMBINE:
                    there, back = back, there
                assert np.array_equal(sent, there)
                assert np.array_equal(received, back)
                assert record["microbatch"] == record["iteration"] % 2
                assert record["timed"]
                assert record["unit"] == 0
                assert record["bytes_per_row"] == 4 * HIDDEN + (4 if op == DISPATCH else 0)
                if op == DISPATCH:
                    assert np.array_equal(experts, to_expert[:, mine].sum(0))


@ALLTOALL
def test_backward_transfers_go_the_other_way(job: list[Rank]) -> None:
    expected = [(it, layer) for it in range(PASSES) for layer in range(LAYERS)]
    for index, rank in enumerate(job):
        for op in (DISPATCH, COMBINE):
            found = rank.transfers(type=op, direction=1)
            assert sorted((int(t["iteration"]), int(t["layer"])) for t, *_ in found) == expected
            for record, sent, received, _ in found:
                rows, _ = matrices(job, record["layer"], int(record["iteration"]))
                there, back = (rows[:, index], rows[index])
                if op == COMBINE:
                    there, back = back, there
                assert np.array_equal(sent, there)
                assert np.array_equal(received, back)
                assert not record["recompute"]
                assert record["microbatch"] == record["iteration"] % 2
                assert record["bytes_per_row"] == 4 * HIDDEN
                assert record["end_ns"] > record["begin_ns"]


@of_cases(*[(r, c) for r, c in BOTH if r > 1 and "allgather" in c])
def test_gathering_sends_every_token_to_every_rank(job: list[Rank]) -> None:
    for rank in job:
        found = rank.transfers(direction=0, recompute=0)
        assert len(found) == 2 * PASSES * LAYERS
        for record, sent, received, _ in found:
            assert record["unit"] == 1
            assert sent.tolist() == received.tolist() == [TOKENS] * len(job)
            # A dispatch carries the probability and the bit of every expert as well.
            gathered = 5 * EXPERTS if record["type"] == DISPATCH else 0
            assert record["bytes_per_row"] == 4 * HIDDEN + gathered
        assert len(rank.transfers(direction=1)) == 2 * PASSES * LAYERS


@of_cases(*[(1, c) for c in CASES])
def test_one_rank_alone_has_no_alltoall(job: list[Rank]) -> None:
    assert job[0].reader.group is None
    assert len(job[0].transfers()) == 0
