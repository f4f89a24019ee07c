"""Which recordings there are at a moment, which of them stands for a rank, and what each has counted."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import run_of
from dodoco_ext.placements import Placements
from dodoco_ext.recording import ROUTE, Reader
from dodoco_ext.sources import Listed, find
from dodoco_ext.transfers import Group, TrafficTotals
from dodoco_ext.views.exporter.identity import Identity, identity_of, layer_labels
from dodoco_ext.views.summary import faults_by_reason, uncovered_of

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
        map_version: Changes of the physical map; without placements, its version in the latest record, or
            None where no record says.
        placements: Where experts lay; None where the recording does not say.
        faults: Telemetry faults by reason; `other` for those whose reason is not known.
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
    placements: Placements | None
    faults: dict[str, int]
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


@dataclass(frozen=True)
class _Found:
    """A recording that may be exposed."""

    identity: Identity
    reader: Reader
    state: str
    uuid: str
    created_ns: int


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
        listed, problem = self._listed()
        states: Counter[str] = Counter(dict.fromkeys(STATES, 0))
        rivals: dict[Identity, list[_Found]] = {}
        present: dict[str, _Found] = {}
        for each in listed:
            try:
                found = self._fresh(each, now)
            except RecordingError:  # or truncated since it was listed
                states["unreadable"] += 1
                continue
            if found is None:
                states[each.state] += 1
                continue
            present[found.uuid] = found
            rivals.setdefault(found.identity, []).append(found)
        shown = []
        for _, group in sorted(rivals.items()):
            first = max(
                group, key=lambda found: (found.state == "live", found.created_ns, found.uuid)
            )
            states["shadowed"] += len(group) - 1
            observed = self._observe(first)
            states["unreadable" if observed is None else first.state] += 1
            if observed is not None:
                shown.append(observed)
        chosen = {each.uuid for each in shown}
        before = [u for u, e in self._known.items() if e.up and u in present and u not in chosen]
        ended = [last for uuid in before if (last := self._observe(present[uuid])) is not None]
        self._known = {each.uuid: each for each in (*shown, *(e for e in ended if e.up))}
        self._alive_ns = {u: t for u, t in self._alive_ns.items() if u in present}
        return Look(now, tuple(shown), tuple(ended), dict(states), problem)

    def _listed(self) -> tuple[list[Listed], str]:
        """What is in the folders, or why that cannot be known."""
        try:
            listed, problem = find(self.folders), ""
        except RecordingError as error:
            listed, problem = [], str(error)
        if problem and problem != self._complaint:
            log.warning("%s", problem)
        self._complaint = problem
        return listed, problem

    def _fresh(self, listed: Listed, now: int) -> _Found | None:
        """A recording that lives, or ended not long ago."""
        reader, state = listed.reader, listed.state
        if reader is None:
            raise RecordingError(listed.problem, state)
        created = int(reader.header["created_unix_ns"])
        if state == "live":
            self._alive_ns[reader.uuid] = now
        elif self._ended_ns(reader, state, created) + self.keep_s * 1e9 < now:
            return None
        return _Found(identity_of(reader), reader, state, reader.uuid, created)

    def _ended_ns(self, reader: Reader, state: str, created: int) -> int:
        if state == "closed":
            return int(reader.header["closed_unix_ns"])
        if reader.uuid in self._known:
            created = self._known[reader.uuid].last_ns or created
        else:
            created = max(created, reader.last_ns())
        return max(created, self._alive_ns.get(reader.uuid, 0))

    def _observe(self, found: _Found) -> Observed | None:
        before = self._known.get(found.uuid)
        if before is not None and not before.up and before.state == found.state:
            return before  # nobody writes to it any more
        try:
            return _observed(found.identity, found.reader, found.state, before)
        except RecordingError as error:
            log.warning("%s", error)
            return None


def _observed(identity: Identity, reader: Reader, state: str, before: Observed | None) -> Observed:
    header, meta = reader.header, reader.metadata
    layers = [each for each in meta["layers"] if isinstance(each, dict)]
    unrouted = [str(each.get("name")) for each in layers if each.get("routed") is False]
    # A layer may be there only to say why it is not observed.
    told = {part["name"] for part in uncovered_of(reader)}
    versions = meta.get("versions")
    version = versions.get("dodoco-ext", "") if isinstance(versions, dict) else ""
    # The counts first: the passes between two reads lay under placements that are then known.
    snapshot = reader.snapshot()
    placements = reader.placements(before.placements if before else None)
    ends = tuple(max(end - _LOOK_BACK, 0) for end in reader.cursor())
    records = reader.read(ends)[0]
    records = records[records["type"] == ROUTE]
    map_version = before.map_version if before else None
    if placements is not None:
        map_version = placements.changes
    elif len(records):
        map_version = int(records["map_version"][-1])
    return Observed(
        identity=identity,
        reader=reader,
        uuid=reader.uuid,
        state=state,
        created_ns=int(header["created_unix_ns"]),
        last_ns=reader.last_ns(),
        layers=layer_labels(reader),
        snapshot=snapshot,
        traffic=reader.traffic(),
        map_version=map_version,
        placements=placements,
        faults=faults_by_reason(header),
        covered=len(meta["layers"]) - len(unrouted),
        uncovered=len(uncovered_of(reader)) + sum(name not in told for name in unrouted),
        world_size=int(header["world_size"]),
        about=(
            run_of(reader),
            str(header["owner_pid"]),
            str(meta.get("host") or ""),
            str(version),
        ),
    )
