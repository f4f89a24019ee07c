"""`dodoco doctor`: what is installed and usable here, what is not, why, and what to do."""

from __future__ import annotations

import difflib
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext import __version__, settings
from dodoco_ext.errors import InputError
from dodoco_ext.settings import SHARED_MEMORY, Settings
from dodoco_ext.views import tables
from dodoco_ext.views.packages import PACKAGES, Package, installed_version, is_older

SCHEMA = "dodoco.doctor/1"
OK, OFF, WARNING, ERROR = "ok", "off", "warning", "error"
_STYLES = {OK: "green", OFF: "dim", WARNING: "yellow", ERROR: "bold red"}
_PYTHONS = ((3, 11), (3, 13))
_SMALL_SHARED_MEMORY = 64 << 20
_BUILD_SETTINGS = ("DODOCO_CUDA",)


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        section: Heading it belongs under.
        name: What was looked at.
        status: `ok`, `off` (something optional does not work), `warning` or `error` (recording
            would not work).
        value: What was found.
        advice: What to do about it; "" where nothing is to be done.
    """

    section: str
    name: str
    status: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Setting:
    """A setting, its value in effect, and where that comes from."""

    name: str
    value: str
    source: str
    meaning: str


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    checks: tuple[Check, ...]
    settings: tuple[Setting, ...]

    @property
    def can_record(self) -> bool:
        """Whether recording would work here."""
        return all(check.status != ERROR for check in self.checks)


def examine() -> Diagnosis:
    """Looks at everything; never raises for what it looks at."""
    problem = ""
    try:
        asked = Settings.from_environment()
    except InputError as error:
        asked, problem = Settings(), str(error)
    checks = [*_installation(), *(_package(package) for package in PACKAGES)]
    if problem:
        checks.append(Check("Settings", "environment", ERROR, problem, "correct or unset it"))
    usable = all(check.status != ERROR for check in checks if check.name == "C++ module")
    if usable:
        checks += [*_places(asked), *_recordings(asked)]
    checks += _oddities(asked)
    return Diagnosis(tuple(checks), tuple(_settings(asked, valid=not problem)))


def _installation() -> Iterator[Check]:
    section = "Installation"
    yield Check(section, "dodoco-ext", OK, __version__)
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        yield Check(section, "Python", ERROR, python, "use Linux: nothing else is supported")
    elif not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        yield Check(section, "Python", WARNING, python, "use Python 3.11 to 3.13, the tested ones")
    else:
        yield Check(section, "Python", OK, python)
    try:
        from dodoco_ext import _C
    except ImportError as error:
        again = "reinstall: pip install --force-reinstall --no-deps dodoco-ext"
        yield Check(section, "C++ module", ERROR, f"does not load: {error}", again)
        return
    value = f"format version {_C.format_version}"
    if _C.version not in (__version__, "0+unknown"):
        again = "reinstall dodoco-ext: a module of another version lies in its folder"
        yield Check(section, "C++ module", ERROR, f"of version {_C.version}, {value}", again)
        return
    yield Check(section, "C++ module", OK, value)
    gpu = Path("/proc/driver/nvidia/version").exists()
    found = "an NVIDIA driver is loaded" if gpu else "no NVIDIA driver here"
    if _C.has_cuda:
        yield Check(section, "CUDA", OK, f"built for {_C.cuda_archs}; {found}")
        return
    advice = "record models on the CPU: routers on a GPU are only reported as uncovered"
    status = WARNING if gpu else OFF
    yield Check(section, "CUDA", status, f"this build has no CUDA code; {found}", advice)


def _package(package: Package) -> Check:
    section, version = "Packages", installed_version(package.name)
    if version is None:
        # Without torch there is no model to record; everything else takes away one part.
        status = ERROR if package.name == "torch" else OFF
        value = f"not installed; needed for {package.needed_for}"
        return Check(section, package.name, status, value, package.remedy)
    if is_older(version, package.minimum):
        wanted = ".".join(map(str, package.minimum))
        value = f"{version}, older than {wanted}, the oldest supported"
        return Check(section, package.name, WARNING, value, package.remedy)
    return Check(section, package.name, OK, version)


def _places(asked: Settings) -> Iterator[Check]:
    from dodoco_ext.views import places

    section, shared = "Folder of the recordings", asked.directory is not None
    found = [
        places.examine(folder, shared=shared, max_bytes=asked.max_bytes)
        for folder in asked.directories()
    ]
    chosen = next((place for place in found if place.recording), None)
    for place in found:
        kind = f"{place.file_system or 'unknown file system'}, {tables.size(place.free_bytes)} free"
        value = f"{place.state}; {kind}"
        name = str(place.folder)
        if place is chosen:
            status = WARNING if place.limited or place is not found[0] else OK
            advice = f"large models do not fit: {place.problem}" if place.limited else ""
            yield Check(section, name, status, value, advice)
            yield Check(section, "trial recording", OK, place.recording)
            return
        status = WARNING if chosen else ERROR
        yield Check(section, name, status, value, place.problem)


def _recordings(asked: Settings) -> Iterator[Check]:
    from dodoco_ext.sources import find
    from dodoco_ext.views.listing import describe

    found = [describe(listed) for listed in find(asked.directories())]
    states = Counter(recording.state for recording in found)
    value = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    advice = "`dodoco show` lists them" if found else ""
    yield Check("Recordings", "found", OK, value, advice)
    for recording in found:
        if recording.problem:
            name = recording.name
            yield Check(
                "Recordings", name, WARNING, recording.problem, "remove it if it is of no use"
            )


def _oddities(asked: Settings) -> Iterator[Check]:
    section = "Environment"
    known = [name for name, _, _ in settings.TABLE]
    for name in settings.given():
        if name not in known and name not in _BUILD_SETTINGS:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else "unset it; the settings are below"
            yield Check(section, name, WARNING, "no setting of this version, so ignored", advice)
    if asked.run is None and ("RANK" in os.environ or asked.world_size > 1):
        value = "several ranks, but no name that their recordings share"
        advice = "set DODOCO_RUN to the same text on every rank"
        yield Check(section, "DODOCO_RUN", WARNING, value, advice)
    if asked.rank >= asked.world_size > 1:
        value = f"rank {asked.rank} of {asked.world_size} ranks"
        advice = "ranks count from 0: correct RANK or WORLD_SIZE"
        yield Check(section, "DODOCO_RANK", WARNING, value, advice)
    if asked.directory is not None and not asked.directory.is_absolute():
        value = f"{asked.directory} is relative: it means another folder elsewhere"
        yield Check(section, "DODOCO_DIR", WARNING, value, "give an absolute path")
    if not SHARED_MEMORY.is_dir():
        advice = "mount a tmpfs there, or set DODOCO_DIR"
        yield Check(section, str(SHARED_MEMORY), WARNING, "does not exist", advice)
    elif (total := shutil.disk_usage(SHARED_MEMORY).total) <= _SMALL_SHARED_MEMORY:
        value = f"only {tables.size(total)}, as containers have by default"
        advice = "run the container with --shm-size=1g, or mount an emptyDir of medium Memory"
        yield Check(section, str(SHARED_MEMORY), WARNING, value, advice)


def _settings(asked: Settings, *, valid: bool) -> Iterator[Setting]:
    given = settings.given()
    in_effect = {
        "DODOCO_DIR": str(asked.directories()[0]),
        "DODOCO_MAX_BYTES": str(asked.max_bytes),
        "DODOCO_RECORD_EVERY": str(asked.record_every),
        "DODOCO_RUN": asked.run or "(start time)",
        "DODOCO_RANK": str(asked.rank),
        "DODOCO_WORLD_SIZE": str(asked.world_size),
        "DODOCO_DEBUG": str(int(settings.debug())),
    }
    for name, default, meaning in settings.TABLE:
        source, value = "default", in_effect.get(name, default)
        other = name.removeprefix("DODOCO_")
        if given.get(name):
            source = "environment"
            value = value if valid else given[name]
        elif other in ("RANK", "WORLD_SIZE") and os.environ.get(other):
            source = f"${other}"
            value = value if valid else os.environ[other]
        yield Setting(name, value, source, meaning)


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """The diagnosis as JSON."""
    return tables.to_json(
        {
            "schema": SCHEMA,
            "can_record": diagnosis.can_record,
            "checks": diagnosis.checks,
            "settings": diagnosis.settings,
        }
    )


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Prints the diagnosis: one line a check, advice below it, the verdict last."""
    from rich.table import Table
    from rich.text import Text

    console = tables.console()
    width = max(len(c.name) for c in diagnosis.checks if len(c.name) <= 20)
    for section in dict.fromkeys(check.section for check in diagnosis.checks):
        console.print(section, style="bold")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, min_width=7)
        grid.add_column(min_width=width, overflow="fold")
        grid.add_column(overflow="fold")
        for check in (c for c in diagnosis.checks if c.section == section):
            text = Text(tables.plain(check.value))
            if check.advice:
                text.append(f"\n-> {tables.plain(check.advice)}", style="italic")
            status = Text(check.status, style=_STYLES[check.status])
            grid.add_row(status, tables.plain(check.name), text)
        console.print(grid)
        console.print()
    console.print("Settings in effect", style="bold")
    table = tables.make_table(
        console,
        ("setting", "value", "from", "meaning"),
        left=("setting", "value", "from", "meaning"),
    )
    for column in table.columns[1::2]:
        column.no_wrap, column.overflow = False, "fold"
    for s in diagnosis.settings:
        table.add_row(s.name, tables.plain(s.value), s.source, s.meaning)
    console.print(table)
    console.print()
    if diagnosis.can_record:
        console.print("Recording works here.", style="bold")
        return
    problems = sum(check.status == ERROR for check in diagnosis.checks)
    noun = "thing" if problems == 1 else "things"
    verdict = f"Recording would not work here: see the {problems} {noun} marked 'error' above."
    console.print(verdict, style="bold red")
