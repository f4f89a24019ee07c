"""EP figures from re-partitioned counts equal those of real ranks that dispatch a real model's routing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ep_job

pytest.importorskip("transformers")

import dodoco_ext as dodoco
from dodoco_ext import metrics
from dodoco_ext.observatory.ep_results import FIXED_GLOBAL, FIXED_PER_RANK
from dodoco_ext.observatory.ep_scan import ep_scan, rank_loads
from dodoco_ext.observatory.models import load_model
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.recording import Reader
from dodoco_ext.transfers import COMBINE, DISPATCH

pytestmark = pytest.mark.timeout(300)

SEQUENCES, TOKENS, TOP_K = 8, 48, 4

Routed = tuple[NDArray[np.int64], NDArray[np.int64]]


@pytest.fixture(scope="module", params=["zoo:gqa", "zoo:mla"])
def routed(request: pytest.FixtureRequest) -> Iterator[Routed]:
    """Choices [sequences, layers, tokens, k] by hooks, and counts [sequences, layers, experts] by the recording."""
    with one_thread(), torch.inference_mode():
        runner: Any = load_model(request.param).runner
        model = runner.model.eval()
        ids = torch.randint(3, 500, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
        with dodoco.attach(model) as attachment:
            names = [layer.name for layer in attachment.reader.snapshot().layers]
            routers = [model.get_submodule(name) for name in names]
            chosen: list[list[Any]] = [[] for _ in routers]
            hooks = [
                router.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[-1]))
                for router, kept in zip(routers, chosen, strict=True)
            ]
            counts = []
            before = attachment.reader.snapshot()
            for sequence in ids:
                model(sequence[None], use_cache=False)
                after = attachment.reader.snapshot()
                counts.append([layer.counts for layer in (after - before).layers])
                before = after
            for hook in hooks:
                hook.remove()
    choices = np.stack(
        [np.stack([c.reshape(TOKENS, -1).numpy() for c in of]) for of in chosen], axis=1
    )
    return choices.astype(np.int64), np.array(counts, dtype=np.int64)


def received(paths: list[Path], layers: int, kind: int) -> NDArray[np.int64]:
    """Rows from each rank to each rank, [layers, R, R], as the captures recorded them."""
    matrices = np.zeros((layers, len(paths), len(paths)), np.int64)
    for rank, path in enumerate(paths):
        found = Reader(path).transfers()
        assert found.lost == 0
        mine = found.records["type"] == kind
        assert sorted(found.records["layer"][mine].tolist()) == list(range(layers))
        for record, sent in zip(found.records[mine], found.sent[mine], strict=True):
            matrices[record["layer"], rank] = sent
    return matrices


def test_the_two_ways_of_counting_agree(routed: Routed) -> None:
    choices, counts = routed
    assert choices.shape[-1] == TOP_K
    one_hot = np.stack(
        [[np.bincount(c.ravel(), minlength=ep_job.NUM_EXPERTS) for c in s] for s in choices]
    )
    assert np.array_equal(one_hot, counts)


@pytest.mark.parametrize("ranks", [4, 8])
def test_real_ranks_receive_what_the_counts_say(tmp_path: Path, routed: Routed, ranks: int) -> None:
    choices, counts = routed
    layers = counts.shape[1]
    paths = ep_job.run(tmp_path, choices, ranks)
    matrices = received(paths, layers, DISPATCH)
    loads = rank_loads(counts.sum(axis=0), ranks)  # [layers, R], without any process
    assert np.array_equal(matrices.sum(axis=1), loads)
    held = np.stack([counts[rank::ranks].sum(axis=0) for rank in range(ranks)])
    assert np.array_equal(matrices, rank_loads(held, ranks).transpose(1, 0, 2))
    assert np.array_equal(received(paths, layers, COMBINE), matrices.transpose(0, 2, 1))

    of_ranks = np.mean(metrics.max_over_mean(matrices.sum(axis=1)))
    per_rank = SEQUENCES // ranks
    found = ep_scan(
        counts,
        TOP_K,
        sequences_per_pass=SEQUENCES,
        sequences_per_rank=per_rank,
        ep_sizes=[ranks],
        num_placements=10,
    )
    for name in (FIXED_GLOBAL, FIXED_PER_RANK):
        [point] = found.arm(name).points
        assert (point.passes, point.tokens_per_pass) == (1, SEQUENCES * TOKENS)
        assert point.rank.value == pytest.approx(of_ranks, rel=1e-12)
