"""Which recordings there are at a moment, which of them stands for a rank, and what each has counted."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import run_of
from dodoco_ext.recording import ROUTE, Reader, Snapshot
from dodoco_ext.sources import find
from dodoco_ext.transfers import Group, TrafficTotals
from dodoco_ext.views.exporter.identity import Identity, identity_of, layer_labels
from dodoco_ext.views.summary import fault_name, uncovered_of

log = logging.getLogger("dodoco")

KEEP_S = 900.0
"""Seconds for which a recording that ended is exposed."""

STATES = ("live", "closed", "dead", "unreadable", "shadowed")

_LOOK_BACK = 256  # slots of a ring among which the latest record is looked for


@dataclass(frozen=True)
class Observed:
    """A recording, and what it had counted when it was looked at.

    Attributes:
        identity: Its labels.
        reader: A reader of it.
        uuid: Unique id of the recording.
        state: `live`, `closed` or `dead`.
        created_ns: When it began, Unix ns.
        last_ns: Its last pass or transfer, Unix ns; 0: none yet.
        layers: The value of `layer`, one a layer.
        snapshot, traffic: Exact counters.
        map_version: Version of the physical map in its latest record; None where no record says.
        faults: Telemetry faults, and the name of the latest.
        covered: Layers with a probe at their router.
        uncovered: Parts of the model without.
    """

    identity: Identity
    reader: Reader
    uuid: str
    state: str
    created_ns: int
    last_ns: int
    layers: list[str]
    snapshot: Snapshot
    traffic: tuple[TrafficTotals, ...]
    map_version: int | None
    faults: tuple[int, str]
    covered: int
    uncovered: int
    world_size: int
    about: tuple[str, str, str, str]

    @property
    def group(self) -> Group | None:
        """The ranks that its transfers are between."""
        return self.reader.group

    @property
    def up(self) -> bool:
        """Whether its owner lives."""
        return self.state == "live"


@dataclass(frozen=True)
class Look:
    """What was found at one moment.

    Attributes:
        time_ns: When, Unix ns.
        shown: The recording of each rank that is exposed, in the order of the labels.
        ended: Others, seen before, that have ended since: their last counts.
        states: How many recordings are in each of `STATES`.
        problem: Why none could be looked for; "" if that is not so.
    """

    time_ns: int
    shown: tuple[Observed, ...]
    ended: tuple[Observed, ...]
    states: dict[str, int]
    problem: str = ""


class Observer:
    """Looks for recordings, again and again; they come and go.

    Of several with equal labels one is exposed: a live one before one that ended, then the latest.

    Args:
        folders: Where to look; None: the settings' folders, asked anew every time.
        keep_s: How long one that ended is exposed.
        clock: Unix time in ns.
    """

    def __init__(
        self,
        folders: Sequence[Path] | None = None,
        keep_s: float = KEEP_S,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.folders = tuple(folders) if folders else None
        self.keep_s = keep_s
        self._clock = clock
        self._alive_ns: dict[str, int] = {}  # by uuid: when it was last seen to live
        self._known: dict[str, Observed] = {}  # by uuid: those exposed, as they were last
        self._complaint = ""

    def look(self) -> Look:
        """Looks now."""
        now = self._clock()
        problem = ""
        try:
            listed = find(self.folders)
        except RecordingError as error:
            listed, problem = [], str(error)
        if problem != self._complaint and problem:
            log.warning("%s", problem)
        self._complaint = problem
        states: Counter[str] = Counter(dict.fromkeys(STATES, 0))
        candidates: dict[Identity, list[tuple[bool, int, str, str, Reader]]] = {}
        present: dict[str, tuple[str, Reader]] = {}
        for found in listed:
            if found.reader is None:
                states["unreadable"] += 1
                continue
            reader, state = found.reader, found.state
            try:
                identity, created = identity_of(reader), int(reader.header["created_unix_ns"])
                if state == "live":
                    self._alive_ns[reader.uuid] = now
                elif self._ended_ns(reader, state, created) + self.keep_s * 1e9 < now:
                    states[state] += 1
                    continue
            except RecordingError:  # truncated since it was listed
                states["unreadable"] += 1
                continue
            present[reader.uuid] = (state, reader)
            rank = (state == "live", created, reader.uuid, state, reader)
            candidates.setdefault(identity, []).append(rank)
        shown = []
        for identity, rivals in sorted(candidates.items()):
            *others, (_, _, uuid, state, reader) = sorted(rivals, key=lambda each: each[:3])
            states["shadowed"] += len(others)
            observed = self._observe(identity, reader, state, uuid)
            if observed is None:
                states["unreadable"] += 1
                continue
            states[state] += 1
            shown.append(observed)
        chosen = {each.uuid for each in shown}
        ended = [
            last
            for uuid, before in self._known.items()
            if uuid not in chosen and before.up and uuid in present
            if (last := self._last_of(before, *present[uuid])) is not None
        ]
        self._known = {each.uuid: each for each in (*shown, *(e for e in ended if e.up))}
        self._alive_ns = {u: t for u, t in self._alive_ns.items() if u in present}
        return Look(now, tuple(shown), tuple(ended), dict(states), problem)

    def _ended_ns(self, reader: Reader, state: str, created: int) -> int:
        if state == "closed":
            return int(reader.header["closed_unix_ns"])
        if reader.uuid in self._known:
            created = self._known[reader.uuid].last_ns or created
        else:
            created = max(created, reader.last_ns())
        return max(created, self._alive_ns.get(reader.uuid, 0))

    def _last_of(self, before: Observed, state: str, reader: Reader) -> Observed | None:
        return self._observe(before.identity, reader, state, before.uuid)

    def _observe(
        self, identity: Identity, reader: Reader, state: str, uuid: str
    ) -> Observed | None:
        before = self._known.get(uuid)
        if before is not None and not before.up and before.state == state:
            return before  # nobody writes to it any more
        try:
            return _observed(identity, reader, state, before)
        except RecordingError as error:
            log.warning("%s", error)
            return None


def _observed(identity: Identity, reader: Reader, state: str, before: Observed | None) -> Observed:
    header, meta = reader.header, reader.metadata
    unrouted = sum(each.get("routed") is False for each in meta["layers"] if isinstance(each, dict))
    versions = meta.get("versions")
    version = versions.get("dodoco-ext", "") if isinstance(versions, dict) else ""
    fault = int(header["last_fault"])
    ends = tuple(max(end - _LOOK_BACK, 0) for end in reader.cursor())
    records = reader.read(ends)[0]
    records = records[records["type"] == ROUTE]
    known = before.map_version if before else None
    return Observed(
        identity=identity,
        reader=reader,
        uuid=reader.uuid,
        state=state,
        created_ns=int(header["created_unix_ns"]),
        last_ns=reader.last_ns(),
        layers=layer_labels(reader),
        snapshot=reader.snapshot(),
        traffic=reader.traffic(),
        map_version=int(records["map_version"][-1]) if len(records) else known,
        faults=(int(header["num_faults"]), fault_name(fault).lower() if fault else "none"),
        covered=len(meta["layers"]) - unrouted,
        uncovered=len(uncovered_of(reader)) + unrouted,
        world_size=int(header["world_size"]),
        about=(
            run_of(reader),
            str(header["owner_pid"]),
            str(meta.get("host") or ""),
            str(version),
        ),
    )
