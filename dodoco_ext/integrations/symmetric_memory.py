"""The AlltoAlls of symmetric memory, whose splits lie on the device and are read there after the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .collectives import BELOW, listener_named


def _vdev(
    keys: torch._C.DispatchKeySet,
    rows: torch.Tensor,
    out: torch.Tensor,
    in_splits: torch.Tensor,
    out_splits_offsets: torch.Tensor,
    group_name: str,
) -> None:
    def read() -> tuple[torch.Tensor, torch.Tensor, None]:
        return in_splits, out_splits_offsets[0], None

    listener, _ = listener_named(group_name)
    done = listener.before_on_device(rows, read) if listener and not rows.is_meta else None
    torch.ops.symm_mem.all_to_all_vdev.default.redispatch(
        keys & BELOW, rows, out, in_splits, out_splits_offsets, group_name
    )
    if done is not None:
        done(True)


def _vdev_2d(
    keys: torch._C.DispatchKeySet,
    rows: torch.Tensor,
    out: torch.Tensor,
    in_splits: torch.Tensor,
    out_splits_offsets: torch.Tensor,
    group_name: str,
    major_align: int | None = None,
) -> None:
    listener, size = listener_named(group_name)

    def read() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # By rank and expert where they come from, by expert and rank where they arrive.
        arrived = out_splits_offsets[0].view(-1, size)
        return in_splits.view(size, -1).sum(1), arrived.sum(0), arrived.sum(1)

    done = listener.before_on_device(rows, read) if listener and not rows.is_meta else None
    torch.ops.symm_mem.all_to_all_vdev_2d.default.redispatch(
        keys & BELOW, rows, out, in_splits, out_splits_offsets, group_name, major_align
    )
    if done is not None:
        done(True)


def _vdev_2d_offset(
    keys: torch._C.DispatchKeySet,
    rows: torch.Tensor,
    out: torch.Tensor,
    in_splits_offsets: torch.Tensor,
    out_splits_offsets: torch.Tensor,
    group_name: str,
) -> None:
    listener, size = listener_named(group_name)

    def read() -> tuple[torch.Tensor, torch.Tensor, None]:
        # The way back: by expert and rank at the source, by rank and expert at the end.
        sent = in_splits_offsets[0].view(-1, size).sum(0)
        return sent, out_splits_offsets[0].view(size, -1).sum(1), None

    done = listener.before_on_device(rows, read) if listener and not rows.is_meta else None
    torch.ops.symm_mem.all_to_all_vdev_2d_offset.default.redispatch(
        keys & BELOW, rows, out, in_splits_offsets, out_splits_offsets, group_name
    )
    if done is not None:
        done(True)


KERNELS: dict[str, Callable[..., Any]] = {
    "all_to_all_vdev": _vdev,
    "all_to_all_vdev_2d": _vdev_2d,
    "all_to_all_vdev_2d_offset": _vdev_2d_offset,
}
