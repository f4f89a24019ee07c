"""The only reader of `DODOCO_*`: every setting, its default and its meaning in one table."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import InputError

SHARED_MEMORY = Path("/dev/shm")
SUFFIX = ".dodoco"
"""Ending of a recording's file name."""
SUPERVISED = "supervised"
"""Folder, among a user's recordings, of those whose job `dodoco run --archive` looks after."""

PLUGIN, ALLOWED_PLUGINS = "dodoco", "VLLM_PLUGINS"
"""The name of vLLM's plugin, and the variable that names the ones it may load; all, where not set."""

TABLE: tuple[tuple[str, str, str], ...] = (
    ("DODOCO", "0", "1: record vLLM servers, by the plugin; `dodoco run` sets it"),
    ("DODOCO_DIR", "/dev/shm/dodoco-UID", "folder of the recordings; shared with the group if set"),
    ("DODOCO_MAX_BYTES", "8388608", "largest recording of one rank, in bytes"),
    ("DODOCO_RECORD_EVERY", "1", "iterations between ring records; the board counts every pass"),
    ("DODOCO_RUN", "the job, or start time", "name of the run that all ranks' recordings share"),
    ("DODOCO_RANK", "$RANK or 0", "rank of this process"),
    ("DODOCO_WORLD_SIZE", "$WORLD_SIZE or 1", "number of ranks of the run"),
    ("DODOCO_DEBUG", "0", "1: the command line prints the traceback of an unexpected error"),
)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        directory: Folder given by `DODOCO_DIR`, or None for the private default.
        max_bytes: Largest recording of one rank.
        record_every: Iterations between ring records (1: every iteration).
        run: Name of the run, or None for one made from the start time. With several ranks, torchrun's
            `--rdzv-id` or Slurm's job and step name it where `DODOCO_RUN` does not.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    directory: Path | None = None
    max_bytes: int = 8 << 20
    record_every: int = 1
    run: str | None = None
    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads the settings.

        Raises:
            InputError: A variable has a value that cannot be used; the message names both.
        """
        env = os.environ if environ is None else environ
        run = env.get("DODOCO_RUN") or None
        if run is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run):
            raise InputError(
                f"DODOCO_RUN={run!r} cannot be part of a file name: use letters, digits, '-', '_'"
            )
        directory = env.get("DODOCO_DIR")
        world_size = _integer(env, ("DODOCO_WORLD_SIZE", "WORLD_SIZE"), 1, minimum=1)
        return cls(
            directory=Path(directory) if directory else None,
            max_bytes=_integer(env, ("DODOCO_MAX_BYTES",), 8 << 20, minimum=1 << 14),
            record_every=_integer(env, ("DODOCO_RECORD_EVERY",), 1, minimum=1),
            run=run or (job_name(env) if world_size > 1 else None),
            rank=_integer(env, ("DODOCO_RANK", "RANK"), 0, minimum=0),
            world_size=world_size,
        )

    def directories(self) -> tuple[Path, ...]:
        """Where recordings of this user may lie: the preferred folder first, then the fallback."""
        if self.directory is not None:
            return (self.directory,)
        name = f"dodoco-{os.getuid()}"
        try:
            temporary = Path(tempfile.gettempdir())
        except FileNotFoundError:  # nowhere to write, as in a container with a read-only root
            return (SHARED_MEMORY / name,)
        return (SHARED_MEMORY / name, temporary / name)

    def reading_directories(self) -> tuple[Path, ...]:
        """`directories()`, and the folders of jobs that `dodoco run --archive` looks after."""
        own = self.directories()
        if self.directory is not None:
            return own
        return (*own, *supervised(own))


def supervised(directories: Iterable[Path]) -> list[Path]:
    """The folders of jobs that `dodoco run --archive` looks after, or did; private ones only."""
    found = []
    for directory in directories:
        try:
            if directory.lstat().st_uid == os.getuid():
                folders = (directory / SUPERVISED).iterdir()
                found += [f for f in sorted(folders) if f.is_dir() and not f.is_symlink()]
        except OSError:  # not there, or not ours to list
            continue
    return found


def debug(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `DODOCO_DEBUG` asks for tracebacks; never fails, as it is read while reporting errors."""
    env = os.environ if environ is None else environ
    return _is_set(env, "DODOCO_DEBUG")


def plugins_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `DODOCO` asks engines that load plugins to be recorded."""
    env = os.environ if environ is None else environ
    return _is_set(env, "DODOCO")


def given(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The settings that the environment names, misspelt ones included, with their text."""
    env = os.environ if environ is None else environ
    return {n: env[n] for n in sorted(env) if n == "DODOCO" or n.startswith("DODOCO_")}


def job_name(env: Mapping[str, str]) -> str | None:
    """What the launcher calls this job, the same in every rank of it, as a part of a file name."""
    elastic, slurm = env.get("TORCHELASTIC_RUN_ID"), env.get("SLURM_JOB_ID")
    if elastic and elastic != "none":  # torchrun's word for "not given"
        name = elastic
    elif slurm:
        name = f"slurm-{slurm}-{env.get('SLURM_STEP_ID', '0')}"
    else:
        return None
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:64]


def variables(
    *, run: str | None = None, directory: Path | None = None, plugins: bool | None = None
) -> dict[str, str]:
    """The environment that asks for a run's name, a folder, or engines to be recorded."""
    wanted = None if plugins is None else int(plugins)
    asked = {"DODOCO_RUN": run, "DODOCO_DIR": directory, "DODOCO": wanted}
    return {name: str(value) for name, value in asked.items() if value is not None}


def _is_set(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() not in ("", "0", "false", "no")


def _integer(env: Mapping[str, str], names: tuple[str, ...], default: int, *, minimum: int) -> int:
    for name in names:
        text = env.get(name)
        if not text:
            continue
        try:
            value = int(text)
        except ValueError:
            raise InputError(f"{name}={text!r} is not a whole number") from None
        if not minimum <= value < 1 << 32:
            raise InputError(f"{name}={value} is out of range: give {minimum} or more")
        return value
    return default


def start_lean() -> None:
    """Before numpy is imported: reading needs no linear algebra, and its threads cost 0.08 s."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
