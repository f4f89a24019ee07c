"""What `dodoco doctor` looks at, each with what it found and what to do about it."""

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
from dodoco_ext.errors import RecordingError
from dodoco_ext.settings import Settings
from dodoco_ext.views import file_systems, tables
from dodoco_ext.views.packages import PACKAGES, Package, installed_version, is_older

OK, OFF, WARNING, ERROR = "ok", "off", "warning", "error"
DRIVER, DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
_PYTHONS = ((3, 11), (3, 13))
_SMALL_SHARED_MEMORY = 64 << 20
_BUILD_SETTINGS = ("DODOCO_CUDA",)
_ADVICE = {
    "creating": "its creator is at work: look again in a moment",
    "unfinished": "its creator ended before it was done: remove it",
    "foreign": "it is no recording: move it to another folder",
    "version": "read it with the dodoco-ext that wrote it, or remove it",
    "truncated": "an incomplete copy? copy it again, or remove it",
    "damaged": "remove it if it is of no use",
    "unreadable": "ask its owner for read access",
}


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


def installation() -> Iterator[Check]:
    """The package itself, the interpreter, the C++ module and the GPU."""
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
    gpu = _gpu()
    yield gpu
    if _C.has_cuda:
        yield Check(section, "CUDA code", OK, f"for {_C.cuda_archs}")
        return
    advice = "record models on the CPU: routers on a GPU are only reported as uncovered"
    status = WARNING if gpu.status == OK else OFF
    yield Check(section, "CUDA code", status, "none in this build", advice)


def _gpu() -> Check:
    """Whether a process here can see a GPU; no library of a driver is loaded to find out."""
    devices = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not DRIVER.exists():
        value = f"no NVIDIA driver is loaded ({DRIVER} does not exist)"
        advice = "models on the CPU need none; for a GPU, install its driver"
    elif not devices:
        value = "an NVIDIA driver is loaded, but no GPU is visible here"
        advice = "start the container with its GPUs, as with --gpus all"
    elif hidden in ("", "-1"):
        value = f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        advice = "unset it, if this process is to use one"
    else:
        return Check("Installation", "GPU", OK, ", ".join(devices))
    return Check("Installation", "GPU", OFF, value, advice)


def packages() -> Iterator[Check]:
    """The packages that parts of DODOCO need."""
    return map(_package, PACKAGES)


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


def folders(asked: Settings) -> Iterator[Check]:
    """The folders that recordings would go to, up to the first that takes one."""
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
            concerns = list(place.concerns)
            if place is not found[0]:
                concerns.append(f"it is used because {found[0].folder} cannot be")
            status = WARNING if concerns else OK
            yield Check(section, name, status, value, "; ".join(concerns))
            yield Check(section, "trial recording", OK, place.recording)
            return
        status = WARNING if chosen else ERROR
        yield Check(section, name, status, value, place.problem)


def recordings(asked: Settings) -> Iterator[Check]:
    """The recordings there are, and by name those that cannot be read."""
    from dodoco_ext.sources import find
    from dodoco_ext.views.listing import describe
    from dodoco_ext.views.summary import uncovered_of

    section, found, readers = "Recordings", [], {}
    for folder in asked.directories():
        try:
            for listed in find((folder,)):
                found.append(describe(listed))
                readers[found[-1].path] = listed.reader
        except RecordingError as error:
            yield Check(section, "not listed", WARNING, str(error), _ADVICE["unreadable"])
    states = Counter(recording.state for recording in found)
    value = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    advice = "`dodoco show` lists them" if found else ""
    if states["dead"]:
        advice += "; a dead one's process ended without closing it, and it stays readable"
    yield Check(section, "found", OK, value, advice)
    for recording in found:
        if recording.problem:
            status = OFF if recording.state == "creating" else WARNING
            advice = _ADVICE.get(recording.state, "remove it if it is of no use")
            yield Check(
                section, recording.name, status, f"{recording.state}: {recording.problem}", advice
            )
        reader = readers[recording.path]
        if reader is not None and recording.state == "live" and (parts := uncovered_of(reader)):
            yield Check(section, recording.name, WARNING, *_not_observed(parts))


def _not_observed(parts: list[dict[str, str]]) -> tuple[str, str]:
    """What a recording says of the parts that are not observed, and what that means."""
    shown = "; ".join(f"{part['name']}: {part['reason']}" for part in parts[:3])
    more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
    noun = "part" if len(parts) == 1 else "parts"
    advice = "what is not observed is missing from every figure, not zero"
    return f"{len(parts)} {noun} not observed: {shown}{more}", advice


def environment(asked: Settings) -> Iterator[Check]:
    """What the environment says that cannot be meant, and shared memory as containers have it."""
    section = "Environment"
    known = [name for name, _, _ in settings.TABLE]
    for name in settings.given():
        if name not in known and name not in _BUILD_SETTINGS:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else "unset it; the settings are below"
            yield Check(section, name, WARNING, "no setting of this version, so ignored", advice)
    if asked.run is None and ("RANK" in os.environ or asked.world_size > 1):
        value = "several ranks, but no name that their recordings share"
        advice = "set DODOCO_RUN to the same text on every rank, or give torchrun --rdzv-id"
        yield Check(section, "DODOCO_RUN", WARNING, value, advice)
    if asked.rank >= asked.world_size > 1:
        value = f"rank {asked.rank} of {asked.world_size} ranks"
        advice = "ranks count from 0: correct RANK or WORLD_SIZE"
        yield Check(section, "DODOCO_RANK", WARNING, value, advice)
    if asked.directory is not None and not asked.directory.is_absolute():
        value = f"{asked.directory} is relative: it means another folder elsewhere"
        yield Check(section, "DODOCO_DIR", WARNING, value, "give an absolute path")
    used = asked.directory is None or asked.directory.is_relative_to(settings.SHARED_MEMORY)
    if used and (problem := _shared_memory(asked.max_bytes)):
        yield Check(section, str(settings.SHARED_MEMORY), WARNING, *problem)


def _shared_memory(max_bytes: int) -> tuple[str, str] | None:
    """What is wrong with /dev/shm, and what to do."""
    folder = settings.SHARED_MEMORY
    if not folder.is_dir():
        return "does not exist", "mount a tmpfs there, or set DODOCO_DIR"
    kind, usage = file_systems.kind_of(folder), shutil.disk_usage(folder)
    if kind and kind not in file_systems.MEMORY:
        return f"is {kind}, not memory", "mount a tmpfs there, or set DODOCO_DIR to one"
    if file_systems.is_read_only(folder):
        return "is mounted read-only", "mount it writable, or set DODOCO_DIR"
    if usage.total <= _SMALL_SHARED_MEMORY:
        value = f"only {tables.size(usage.total)}, as containers have by default"
        advice = "run the container with --shm-size=1g, or mount an emptyDir of medium Memory"
        return value, advice
    if usage.free // 10 < max_bytes:
        value = f"{tables.size(usage.free)} of {tables.size(usage.total)} free; a recording takes up to a tenth"
        return value, "remove what is not needed there, or set DODOCO_DIR"
    return None
