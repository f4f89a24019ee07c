"""Matrices rebuilt from recordings equal what each rank sent by its own routing map."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alltoall_job import Job, run
from dodoco_ext.recording import Reader
from dodoco_ext.transfers import COMBINE, DISPATCH

pytestmark = pytest.mark.timeout(300)

Key = tuple[int, int, int, int, bool]  # iteration, layer, type, direction, recompute


def sent_by_maps(results: list[dict], job: Job) -> NDArray[np.int64]:
    """Rows from each rank to each rank, [iterations, layers, R, R], by the routing maps alone."""
    times = 2 if job.recompute else 1
    told = np.array([result["sent"] for result in results])  # [R, layers, iterations x times, R]
    assert told.shape == (job.ranks, job.layers, job.iterations * times, job.ranks)
    first, again = told[:, :, ::times], told[:, :, times - 1 :: times]
    assert np.array_equal(first, again), "recomputed layers must route as they did"
    return first.transpose(2, 1, 0, 3)


def recorded_of(result: dict, job: Job) -> dict[Key, tuple[NDArray, NDArray]]:
    """All transfers of a rank's recording; each at most once."""
    transfers = Reader(result["path"]).transfers()
    assert transfers.lost == 0
    found: dict[Key, tuple[NDArray, NDArray]] = {}
    for record, sent, received in zip(
        transfers.records, transfers.sent, transfers.received, strict=True
    ):
        key = (
            int(record["iteration"]),
            int(record["layer"]),
            int(record["type"]),
            int(record["direction"]),
            bool(record["recompute"]),
        )
        assert key not in found
        assert record["timed"]
        assert record["end_ns"] > record["begin_ns"]
        assert record["bytes_per_row"] == 4 * job.hidden
        found[key] = (sent, received)
    return found


def check(job: Job, results: list[dict]) -> None:
    """Every execution is recorded once, with exact rows, and sender and receiver agree."""
    matrices = sent_by_maps(results, job)
    recorded = [recorded_of(result, job) for result in results]
    for iteration in range(job.iterations):
        for layer in range(job.layers):
            matrix = matrices[iteration, layer]
            there = [(DISPATCH, 0, False), (COMBINE, 1, False)]
            back = [(COMBINE, 0, False), (DISPATCH, 1, False)]
            if job.recompute:
                there.append((DISPATCH, 0, True))
                back.append((COMBINE, 0, True))
            for kinds, wanted in ((there, matrix), (back, matrix.T)):
                for kind in kinds:
                    key = (iteration, layer, *kind)
                    if key[4] and all(key not in of_rank for of_rank in recorded):
                        # Recomputation ends once it has what backward needs.
                        assert kind[0] == COMBINE
                        continue
                    rows = [of_rank.pop(key) for of_rank in recorded]
                    assert np.array_equal([sent for sent, _ in rows], wanted), key
                    assert np.array_equal([received for _, received in rows], wanted.T), key
    assert recorded == [{}] * job.ranks, "nothing else is recorded"
    for rank, result in enumerate(results):
        assert "unattributed" not in result["passed_over"]
        for total in Reader(result["path"]).traffic():
            matrix = matrices[:, total.layer].sum(0)
            sent = matrix[rank] if total.op == DISPATCH else matrix[:, rank]
            assert np.array_equal(total.sent, sent)
            assert total.executions == total.backward == job.iterations


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("recompute", ["", "reentrant", "saved"])
def test_matrices_equal_the_routing_maps(tmp_path: Path, ranks: int, recompute: str) -> None:
    job = Job(str(tmp_path), ranks, recompute=recompute)
    check(job, run(job))


@pytest.mark.parametrize("style", ["async", "functional", "saving"])
@pytest.mark.parametrize("recompute", ["", "saved"])
def test_every_way_of_sending_is_seen(tmp_path: Path, style: str, recompute: str) -> None:
    job = Job(str(tmp_path), 2, style=style, recompute=recompute)
    check(job, run(job))


@pytest.mark.parametrize("placed", ["explicit", "order"])
def test_layers_are_known_without_their_modules(tmp_path: Path, placed: str) -> None:
    job = Job(str(tmp_path), 2, placed=placed)
    check(job, run(job))


def test_a_rank_without_tokens_sends_nothing(tmp_path: Path) -> None:
    job = Job(str(tmp_path), 4, idle=1)
    check(job, run(job))


@pytest.mark.parametrize("recompute", ["reentrant", "saved"])
def test_in_mere_order_what_is_recomputed_is_refused_and_never_guessed(
    tmp_path: Path, recompute: str
) -> None:
    job = Job(str(tmp_path), 2, placed="order", recompute=recompute)
    results = run(job)
    for result in results:
        recorded = Counter(
            (int(record["direction"]), bool(record["recompute"]))
            for record in Reader(result["path"]).transfers().records
        )
        assert recorded[0, False] == 2 * job.layers * job.iterations
        assert recorded[0, True] == 0
        assert result["passed_over"]["unattributed"] > 0


def test_capturing_changes_no_bit(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "captured").mkdir()
    bare = run(Job(str(tmp_path / "bare"), 2, captured=False))
    captured = run(Job(str(tmp_path / "captured"), 2))
    assert [r["outputs"] for r in bare] == [r["outputs"] for r in captured]
    assert [r["sent"] for r in bare] == [r["sent"] for r in captured]
