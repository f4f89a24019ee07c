"""`dodoco show` without a SOURCE: the recordings there are, one line each, or as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import run_of
from dodoco_ext.recording import Reader
from dodoco_ext.sources import Listed
from dodoco_ext.views import tables
from dodoco_ext.views.tables import duration, plain, quantity

SCHEMA = "dodoco.recordings/2"
PRUNED_SCHEMA = "dodoco.pruned/1"


@dataclass(frozen=True)
class RecordingInfo:
    """One recording as a whole.

    Attributes:
        state: `live`, `closed`, `dead` (its owner is gone), or the state of a file that cannot be read
            (see `RecordingError.state`), with `problem`.
        model: The label `model_name`, or the program that recorded.
        tokens: Tokens of the layer that saw most.
        age_s: Seconds since the recording began.
        duration_s: Seconds it has lasted; None where it died and nobody knows when.
    """

    name: str
    path: str
    run: str
    state: str
    problem: str | None = None
    rank: int | None = None
    world_size: int | None = None
    pid: int | None = None
    host: str | None = None
    program: str | None = None
    model: str | None = None
    labels: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    layers: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    created_unix_ns: int | None = None
    closed_unix_ns: int | None = None
    age_s: float | None = None
    duration_s: float | None = None


def describe(listed: Listed) -> RecordingInfo:
    """Describes one recording of a listing, readable or not."""
    if listed.reader is None:
        return _unread(listed, listed.state, listed.problem)
    try:
        return _read(listed, listed.reader)
    except RecordingError as error:  # truncated since it was opened
        return _unread(listed, error.state, str(error))


def _unread(listed: Listed, state: str, problem: str) -> RecordingInfo:
    name = listed.path.name
    return RecordingInfo(name, str(listed.path), name.split(".")[0], state, problem)


def _read(listed: Listed, reader: Reader) -> RecordingInfo:
    header, meta, state = reader.header, reader.metadata, reader.state
    now_ns = time.time_ns()
    created, closed = int(header["created_unix_ns"]), int(header["closed_unix_ns"])
    ends = {"closed": closed, "live": now_ns}
    labels = texts(meta.get("labels"))
    program = str(meta.get("program") or "") or None
    return RecordingInfo(
        name=listed.path.name,
        path=str(listed.path),
        run=run_of(reader),
        state=state,
        rank=header["rank"],
        world_size=header["world_size"],
        pid=header["owner_pid"],
        host=str(meta.get("host") or "") or None,
        program=program,
        model=labels.get("model_name") or program,
        labels=labels,
        versions=texts(meta.get("versions")),
        layers=len(meta["layers"]),
        tokens=max(layer.tokens for layer in reader.snapshot().layers),
        bytes=header["file_bytes"],
        created_unix_ns=created,
        closed_unix_ns=closed or None,
        age_s=max(now_ns - created, 0) / 1e9,
        duration_s=(ends[state] - created) / 1e9 if state in ends else None,
    )


def texts(value: object) -> dict[str, str]:
    """A mapping of texts out of metadata, which comes from a file and may be anything."""
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


def to_json(recordings: Sequence[RecordingInfo], folders: Iterable[Path]) -> str:
    """The listing as JSON."""
    return tables.to_json(
        {
            "schema": SCHEMA,
            "folders": [str(folder) for folder in folders],
            "recordings": list(recordings),
        }
    )


def pruned_json(removed: Sequence[Path], folders: Iterable[Path]) -> str:
    """What was pruned, as JSON."""
    return tables.to_json(
        {
            "schema": PRUNED_SCHEMA,
            "folders": [str(folder) for folder in folders],
            "removed": [str(path) for path in removed],
        }
    )


def print_pruned(removed: Sequence[Path], folders: Iterable[Path]) -> None:
    """Prints what was pruned, one line a file."""
    console = tables.console()
    for path in removed:
        console.print(f"removed {plain(str(path))}", soft_wrap=True)
    where = ", ".join(plain(str(folder)) for folder in folders)
    what = f"{len(removed)} recording{'' if len(removed) == 1 else 's'}" if removed else "nothing"
    console.print(f"removed {what} from {where}", soft_wrap=True)


def print_listing(recordings: Sequence[RecordingInfo], folders: Sequence[Path]) -> None:
    """Prints one line a recording, latest first, by folder."""
    console = tables.console()
    if not recordings:
        console.print("no recordings in " + ", ".join(plain(str(f)) for f in folders))
        console.print("To make one: `dodoco observe --preset demo`, or dodoco_ext.attach(model).")
        return
    wide = console.width >= 100
    columns = ("state", "rank", "model", "layers", "tokens", "age", "pid", "recording")
    for folder in dict.fromkeys(str(Path(r.path).parent) for r in recordings):
        here = [r for r in recordings if str(Path(r.path).parent) == folder]
        table = tables.make_table(
            console,
            [name for name in columns if wide or name not in ("layers", "pid")],
            left=("state", "model", "recording"),
        )
        table.columns[2].max_width = 32 if wide else 16
        # A name is there to be copied: rather on two lines than cut off.
        table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
        for r in here:
            cells = {
                "state": r.state,
                "rank": "-" if r.rank is None else f"{r.rank}/{r.world_size}",
                "model": plain(r.model or "-"),
                "layers": quantity(r.layers),
                "tokens": quantity(r.tokens),
                "age": duration(r.age_s),
                "pid": "-" if r.pid is None else str(r.pid),
                "recording": plain(r.name),
            }
            table.add_row(
                *(cells[str(column.header)] for column in table.columns),
                style="bold" if r.state == "live" else None,
            )
        console.print(f"{plain(folder)}: {len(here)} recording{'s' if len(here) > 1 else ''}")
        console.print(table)
        console.print()
    for r in recordings:
        if r.problem:
            console.print(plain(f"{r.state}: {r.problem}"), style="yellow")
    console.print("Summarise one: dodoco show SOURCE (a name above, a run, a PID), or --latest.")
