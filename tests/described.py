"""What is read from a recording, as JSON: by `Reader`, and by the reader that follows the document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dodoco_ext.recording import COUNTERS, RECORD_DTYPE, Reader
from format_reader import FormatReader

HEADER = (
    "format_version",
    "file_bytes",
    "created_unix_ns",
    "created_monotonic_ns",
    "closed_unix_ns",
    "owner_pid",
    "rank",
    "world_size",
    "num_lanes",
    "num_faults",
    "last_fault",
)
RECORD = tuple(name for name in RECORD_DTYPE.names or () if name != "reserved")
Described = dict[str, Any]


def cells(histogram: Any) -> dict[str, int]:
    """The cells [20, 32] that are not zero, by row and bin."""
    table = np.asarray(histogram).reshape(20, 32)
    return {f"{row} {bin_}": int(table[row, bin_]) for row, bin_ in np.argwhere(table)}


def by_reader(path: Path) -> Described:
    reader = Reader(path)
    header = reader.header
    records, cursor, lost = reader.read()
    return {
        "state": reader.state,
        "uuid": reader.uuid,
        "header": {name: int(header[name]) for name in HEADER},
        "metadata": reader.metadata,
        "layers": [
            {
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                **{name: getattr(layer, name) for name in COUNTERS},
                "counts": layer.counts.tolist(),
                "gini": cells(layer.gini_histogram),
                "max_over_mean": cells(layer.max_over_mean_histogram),
                "in_flight": layer.in_flight,
            }
            for layer in reader.snapshot().layers
        ],
        "cursor": list(cursor),
        "lost": lost,
        "records": [[int(record[name]) for name in RECORD] for record in records],
    }


def by_format(path: Path) -> Described:
    reader = FormatReader(path)
    header = reader.header
    clock = header["created_unix_ns"] - header["created_monotonic_ns"]
    rings = [reader.ring(lane) for lane in reader.lanes]
    return {
        "state": reader.state(),
        "uuid": header["uuid"].hex(),
        "header": {name: header[name] for name in HEADER},
        "metadata": reader.metadata,
        "layers": [_layer(reader, layer) for layer in range(header["num_layers"])],
        "cursor": [cursor for _, cursor, _ in rings],
        "lost": sum(lost for _, _, lost in rings),
        "records": [_record(*record, clock) for record in reader.routes()],
    }


def _layer(reader: FormatReader, layer: int) -> Described:
    num_experts, top_k, *_ = reader.layers[layer]
    words, consistent = reader.board(layer)
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        **dict(zip(COUNTERS, words, strict=False)),
        "counts": words[16 : 16 + num_experts],
        "gini": cells(words[-1280:-640]),
        "max_over_mean": cells(words[-640:]),
        "in_flight": not consistent,
    }


def _record(time: int, lane: int, v: tuple[int, ...], clock: int) -> list[int]:
    values = {
        "iteration": v[2] | v[3] << 32,
        "time_ns": time + clock,
        "gini_numerator": v[9] | v[10] << 32,
        "layer": v[1] & 0xFFFF,
        "microbatch": v[1] >> 16,
        "tokens": v[6],
        "assignments": v[7],
        "max_count": v[8],
        "padded": v[11],
        "invalid": v[12],
        "capacity_dropped": v[13],
        "unused_experts": v[14],
        "map_version": v[15],
        "type": v[0] & 0xFF,
        "lane": lane,
        "direction": v[0] >> 16 & 1,
        "recompute": v[0] >> 17 & 1,
    }
    return [values[name] for name in RECORD]
