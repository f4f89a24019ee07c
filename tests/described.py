"""What is read from a recording, as JSON: by `Reader`, and by the reader that follows the document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dodoco_ext.counters import COUNTERS
from dodoco_ext.recording import RECORD_DTYPE, Reader
from dodoco_ext.transfers import TRANSFER_DTYPE
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
TRANSFER = tuple(name for name in TRANSFER_DTYPE.names or () if name != "reserved")
TOTALS = ("executions", "backward", "recomputed", "untimed", "sent_bytes", "received_bytes")
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
        **(_transfers_by_reader(reader) if reader.group else {}),
        **_placements_by_reader(reader),
    }


def _placements_by_reader(reader: Reader) -> Described:
    placements = reader.placements()
    if placements is None:
        return {}
    return {
        "placements": [
            [
                [
                    *(p.version, p.time_ns, p.iteration, p.num_ranks),
                    *(p.counts.tolist(), p.experts.tolist(), p.ranks.tolist()),
                ]
                for p in layer.kept
            ]
            for layer in placements.layers
        ]
    }


def _transfers_by_reader(reader: Reader) -> Described:
    found = reader.transfers()
    rows = zip(found.records, found.sent, found.received, found.experts, strict=True)
    return {
        "transfers": sorted(
            [
                [int(record[name]) for name in TRANSFER],
                [*sent.tolist(), *received.tolist(), *experts[: record["num_experts"]].tolist()],
            ]
            for record, sent, received, experts in rows
        ),
        "traffic": [
            [getattr(totals, name) for name in (*TOTALS, "duration_ns")]
            + [totals.sent.tolist(), totals.received.tolist()]
            for totals in reader.traffic()
        ],
    }


def by_format(path: Path) -> Described:
    reader = FormatReader(path)
    header = reader.header
    clock = header["created_unix_ns"] - header["created_monotonic_ns"]
    rings = [reader.ring(lane) for lane in reader.lanes]
    transfers, stray = reader.transfers()
    return {
        "state": reader.state(),
        "uuid": header["uuid"].hex(),
        "header": {name: header[name] for name in HEADER},
        "metadata": reader.metadata,
        "layers": [_layer(reader, layer) for layer in range(header["num_layers"])],
        "cursor": [cursor for _, cursor, _ in rings],
        "lost": sum(lost for _, _, lost in rings) + stray,
        "records": [_record(*record, clock) for record in reader.routes()],
        **(_transfers_by_format(reader, transfers, clock) if "group" in reader.metadata else {}),
        **(_placements_by_format(reader, clock) if (5, 0) in reader.places else {}),
    }


def _placements_by_format(reader: FormatReader, clock: int) -> Described:
    return {
        "placements": [
            [
                [
                    *(v[0], (v[1] | v[2] << 32) + clock, v[3] | v[4] << 32, v[5], counts),
                    [-1 if slot == 2**32 - 1 else slot & 0xFFFF for slot in slots],
                    [-1 if slot == 2**32 - 1 else slot >> 16 for slot in slots],
                ]
                for v, counts, slots in reader.placements(layer)
            ]
            for layer in range(reader.header["num_layers"])
        ]
    }


def _transfers_by_format(
    reader: FormatReader, transfers: list[tuple[int, Any, Any]], clock: int
) -> Described:
    size = len(reader.metadata["group"]["ranks"])
    blocks = [
        reader.traffic(layer, kind)
        for layer in range(reader.header["num_layers"])
        for kind in (2, 3)
    ]
    return {
        "transfers": sorted(
            [_transfer(lane, v, clock), list(counts[: 2 * size + (v[9] >> 16)])]
            for lane, v, counts in transfers
        ),
        "traffic": [
            [*words[1:8], words[16 : 16 + size], words[16 + size : 16 + 2 * size]]
            for words in blocks
        ],
    }


def _transfer(lane: int, v: tuple[int, ...], clock: int) -> list[int]:
    values = {
        "iteration": v[2] | v[3] << 32,
        "begin_ns": (v[4] | v[5] << 32) + clock,
        "end_ns": (v[6] | v[7] << 32) + clock,
        "layer": v[1] & 0xFFFF,
        "microbatch": v[1] >> 16,
        "bytes_per_row": v[8],
        "sequence": v[10],
        "num_experts": v[9] >> 16,
        "map_version": v[11],
        "type": v[0] & 0xFF,
        "lane": lane,
        "direction": v[0] >> 16 & 1,
        "recompute": v[0] >> 17 & 1,
        "timed": 1 - (v[0] >> 18 & 1),
        "unit": v[0] >> 19 & 1,
    }
    return [values[name] for name in TRANSFER]


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
