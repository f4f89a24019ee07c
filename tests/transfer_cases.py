"""Transfers of every kind, and what a recording of them has to hold: counted the slow way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dodoco_ext.capture import Capture
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings
from dodoco_ext.transfers import COMBINE, DISPATCH, UNITS


@dataclass(frozen=True)
class Sent:
    """One transfer to record."""

    layer: int
    op: int
    send: tuple[int, ...]
    receive: tuple[int, ...]
    experts: tuple[int, ...] = ()
    backward: bool = False
    recompute: bool = False
    iteration: int = -1
    bytes_per_row: int = 1
    unit: str = "assignment"
    timed: bool = True
    begin_ns: int = 1000
    end_ns: int = 1500

    @property
    def forward(self) -> bool:
        return not self.backward and not self.recompute


def push(capture: Capture, sent: Sent) -> int:
    return capture.push(
        sent.layer, sent.op, list(sent.send), sent.receive, sent.begin_ns, sent.end_ns,
        backward=sent.backward, recompute=sent.recompute, iteration=sent.iteration,
        experts=sent.experts or None, bytes_per_row=sent.bytes_per_row, unit=sent.unit,
        timed=sent.timed,
    )  # fmt: skip


def iterations(transfers: Sequence[Sent]) -> list[int]:
    """The iteration of each, where forward dispatches start them."""
    found, iteration, last = [], 0, -1
    for sent in transfers:
        if sent.forward and sent.op == DISPATCH:
            iteration, last = iteration + (sent.layer <= last), sent.layer
        found.append(sent.iteration if sent.iteration >= 0 else iteration)
    return found


def assert_records_are(reader: Reader, transfers: Sequence[Sent]) -> None:
    """The ring holds the last of them, as they were, in order."""
    found = reader.transfers()
    kept = len(found)
    expected = transfers[len(transfers) - kept :]
    clock = reader.header["created_unix_ns"] - reader.header["created_monotonic_ns"]
    records = found.records
    order = np.argsort(records["sequence"], kind="stable")
    assert records["sequence"][order].tolist() == list(range(len(transfers) - kept, len(transfers)))
    for row, sent, iteration in zip(
        order, expected, iterations(transfers)[len(transfers) - kept :], strict=True
    ):
        record = records[row]
        assert found.sent[row].tolist() == list(sent.send)
        assert found.received[row].tolist() == list(sent.receive)
        experts = found.experts[row].tolist()
        assert experts == [*sent.experts, *[0] * (len(experts) - len(sent.experts))]
        assert (record["type"], record["layer"]) == (sent.op, sent.layer)
        assert (record["direction"], record["recompute"]) == (sent.backward, sent.recompute)
        assert (record["timed"], UNITS[record["unit"]]) == (sent.timed, sent.unit)
        assert (record["begin_ns"] - clock, record["end_ns"] - clock) == (
            sent.begin_ns,
            sent.end_ns,
        )
        assert record["bytes_per_row"] == sent.bytes_per_row
        assert (record["iteration"], record["num_experts"]) == (iteration, len(sent.experts))


def assert_totals_are(reader: Reader, transfers: Sequence[Sent]) -> None:
    """The totals of each layer and type are those of all transfers, whatever the ring has lost."""
    assert reader.group is not None
    ranks = len(reader.group.ranks)
    for totals in reader.traffic():
        ours = [sent for sent in transfers if (sent.layer, sent.op) == (totals.layer, totals.op)]
        forward = [sent for sent in ours if sent.forward]
        zeros = [(0,) * ranks]
        assert totals.sent.tolist() == np.sum([s.send for s in forward] or zeros, axis=0).tolist()
        assert (
            totals.received.tolist()
            == np.sum([s.receive for s in forward] or zeros, axis=0).tolist()
        )
        assert totals.executions == len(forward)
        assert totals.backward == sum(sent.backward for sent in ours)
        assert totals.recomputed == sum(s.recompute and not s.backward for s in ours)
        assert totals.untimed == sum(not sent.timed for sent in ours)
        assert totals.duration_ns == sum(max(s.end_ns - s.begin_ns, 0) for s in ours if s.timed)
        assert totals.sent_bytes == sum(sum(s.send) * s.bytes_per_row for s in ours)
        assert totals.received_bytes == sum(sum(s.receive) * s.bytes_per_row for s in ours)
        assert not totals.in_flight


def open_recorder(
    settings: Settings, ranks: int, *, layers: int = 2, **options: object
) -> Recorder:
    specs = [LayerSpec(f"layers.{i}", 8, 2, routed=False) for i in range(layers)]
    group = GroupSpec(tuple(range(10, 10 + ranks)), ranks - 1)
    return Recorder(specs, group=group, settings=settings, **options)  # type: ignore[arg-type]


def of_every_kind(ranks: int, count: int, seed: int = 0) -> list[Sent]:
    """Transfers with every flag, counts from 0 to 2^32 - 1 and up to 40 experts."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        top = int(rng.choice([1, 10, 1000, 2**32]))
        draw = lambda size: tuple(int(n) for n in rng.integers(0, top, size))  # noqa: B023, E731
        kind = int(rng.integers(0, 4))
        found.append(
            Sent(
                layer=int(rng.integers(0, 2)),
                op=DISPATCH if rng.random() < 0.5 else COMBINE,
                send=draw(ranks),
                receive=draw(ranks),
                experts=draw(int(rng.integers(0, 41))) if number % 3 == 0 else (),
                backward=kind == 1,
                recompute=kind == 2,
                iteration=int(rng.integers(0, 2**40)) if kind in (1, 2) else -1,
                bytes_per_row=int(rng.integers(0, 2**20)),
                unit=UNITS[int(rng.integers(0, 2))],
                timed=bool(rng.random() < 0.8),
                begin_ns=1000 * number,
                end_ns=1000 * number + int(rng.integers(0, 900)),
            )
        )
    return found


def moved(sent: Sent, by: int) -> Sent:
    """The same, later."""
    return replace(sent, begin_ns=sent.begin_ns + by, end_ns=sent.end_ns + by)
