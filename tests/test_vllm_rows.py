"""Which rows of a pass a rank of vLLM counts: together all ranks count each token once."""

from __future__ import annotations

import pytest
import torch

from dodoco_ext.integrations.vllm_rows import Rows
from vllm_stubs import Group, ids_of, install, parallel


@pytest.mark.parametrize("scheduled_tokens", [0, 1, 4, 5, 7])
def test_ranks_of_tensor_parallelism_count_each_token_once(scheduled_tokens: int) -> None:
    """All of them route the same rows, padded alike."""
    size, padded = 4, 8
    chosen = ids_of(padded)
    rows = [Rows(rank, size) for rank in range(size)]
    own = [rank.select(chosen)[: rank.num_valid(scheduled_tokens)] for rank in rows]
    got = sorted(map(tuple, torch.cat(own).tolist()))
    assert got == sorted(map(tuple, chosen[:scheduled_tokens].tolist()))


@pytest.mark.parametrize("gathered", [True, False])
def test_ranks_of_data_parallelism_count_their_own_rows(
    gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [3, 5, 2]
    install(monkeypatch, sizes=sizes)
    everything = torch.arange(sum(sizes))[:, None]
    own = everything.split(sizes)
    for rank, mine in enumerate(own):
        rows = Rows(dp_rank=rank, dp_size=len(sizes))
        assert rows.select(everything if gathered else mine).tolist() == mine.tolist()


def test_a_rank_among_both_counts_its_share_of_its_own_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [8, 4]
    install(monkeypatch, sizes=sizes, groups={"tp": Group([2, 3], 1)})
    rows = Rows.of(parallel(tensor_parallel_size=2, data_parallel_size=2, data_parallel_rank=1))
    assert rows == Rows(tp_rank=1, tp_size=2, dp_rank=1, dp_size=2)
    assert rows.select(torch.arange(12)[:, None]).flatten().tolist() == [9, 11]
    assert rows.num_valid(3) == 1
