"""Routing without the first position of each sequence, which in many models is a sink like no other token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import reference
from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.errors import DodocoError
from dodoco_ext.observatory.summary import USED, Window

_RECORD = np.dtype([("layer", np.int64), *((name, np.int64) for name in USED)])


def without_first(passes: Sequence[tuple[Snapshot, Snapshot]]) -> Window:
    """What passes counted beyond the first positions of their sequences.

    A causal model routes a sequence's first token without regard to what follows it: a pass over
    the first tokens alone counts exactly what they add to a pass over the whole sequences.

    Args:
        passes: Of each pass, what it counted, and what a pass over its first tokens alone counted.

    Raises:
        DodocoError: The first tokens were routed otherwise when they were alone.
    """
    counts = [[_counts(*layers) for layers in _layers(*pair)] for pair in passes]
    records = []
    for pair, of_pass in zip(passes, counts, strict=True):
        tokens = [whole.tokens - first.tokens for whole, first in _layers(*pair)]
        rows = [_row(n, c, t) for n, (c, t) in enumerate(zip(of_pass, tokens, strict=True))]
        records.append(np.array(rows, dtype=_RECORD))
    layers = []
    for number, layer in enumerate(passes[0][0].layers):
        total = np.sum([of_pass[number] for of_pass in counts], axis=0)
        layers.append(
            replace(
                layer,
                passes=len(passes),
                tokens=int(sum(record["tokens"][number] for record in records)),
                assignments=int(total.sum()),
                counts=total.astype(np.uint64),
                in_flight=any(half.layers[number].in_flight for pair in passes for half in pair),
            )
        )
    return Window(replace(passes[0][0], layers=tuple(layers)), records, counts)


def _layers(whole: Snapshot, first: Snapshot) -> list[tuple[LayerSnapshot, LayerSnapshot]]:
    return list(zip(whole.layers, first.layers, strict=True))


def _counts(whole: LayerSnapshot, first: LayerSnapshot) -> NDArray[np.int64]:
    counts = whole.counts.astype(np.int64) - first.counts.astype(np.int64)
    if counts.min() < 0:
        raise DodocoError(
            f"{whole.name} routes first tokens otherwise when they are alone: the model is not causal, "
            "or its arithmetic depends on the shape; leave out --without-first"
        )
    return counts


def _row(layer: int, counts: NDArray[np.int64], tokens: int) -> tuple[int, ...]:
    values = {
        "gini_numerator": reference.gini_numerator(counts),
        "assignments": int(counts.sum()),
        "max_count": int(counts.max()),
        "tokens": tokens,
        "unused_experts": int((counts == 0).sum()),
    }
    return (layer, *(values[name] for name in USED))
