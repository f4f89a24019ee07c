"""`dodoco run`: starts a command that records, outlives it, and archives what it recorded."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dodoco_ext.archive import Collector, of_this_job
from dodoco_ext.errors import InputError
from dodoco_ext.folders import distrust
from dodoco_ext.settings import (
    ALLOWED_PLUGINS,
    PLUGIN,
    SUPERVISED,
    Settings,
    job_name,
    supervised,
    variables,
)

EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_SIGNAL = 126, 127, 128

FORWARDED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2),
)

LOCK, TARGET = "supervisor.lock", "archive"
_LOOK_S = 2.0
_FROM_KERNEL = 0x80  # si_code of a signal that nobody sent, such as that of Ctrl-C


class Supervisor:
    """Runs one command and looks after its recordings.

    Args:
        command: The program and its arguments.
        archive: Folder to copy the recordings to; None: they stay where they are.
        run: Name of the run; None: `DODOCO_RUN`, the launcher's, or one made here.
        grace_s: How long recordings may stay live after the command, as those of processes that it
            left behind; after that they are archived as they are.
        environ: The environment; this process's by default.

    Raises:
        InputError: No command, or a name or setting that cannot be used.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        archive: Path | None = None,
        run: str | None = None,
        grace_s: float = 10.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        if not command:
            raise InputError("no command: give one, as in `dodoco run -- python train.py`")
        self.command = list(command)
        self.grace_s = grace_s
        self.archive = None if archive is None else archive.absolute()
        given = os.environ if environ is None else environ
        self.environ = {**variables(plugins=True), **given}  # who says DODOCO=0 has it
        allow_plugin(self.environ)
        self.environ.update(variables(run=run))
        self.settings = Settings.from_environment(self.environ)
        self.run = self.settings.run or job_name(self.environ) or self._invented()
        self.environ.update(variables(run=self.run))

    def __call__(self) -> int:
        """Runs the command to its end.

        Returns:
            Its exit status; 128 + n if signal n ended it, 126 or 127 if it cannot be started.
        """
        if self.archive is not None:
            collect_abandoned(self.settings.directories())
        with contextlib.ExitStack() as stack:
            collector = self._collector(stack)
            old = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
            stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, old)
            try:
                # What Python ignores, programs expect to end by.
                child = os.posix_spawnp(
                    self.command[0],
                    self.command,
                    self.environ,
                    setsigmask=old,
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
                )
            except OSError as error:
                say(f"{self.command[0]} cannot be started: {error.strerror}; check the command")
                missing = isinstance(error, FileNotFoundError)
                return EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE
            code = _wait(child, collector)
            self._finish(collector)
            return code

    def _invented(self) -> str | None:
        """A name of this very run; None where it has to be one that other ranks have too."""
        if self.settings.world_size > 1:
            return None
        return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)

    def _collector(self, stack: contextlib.ExitStack) -> Collector | None:
        if self.archive is None:
            return None
        try:
            self.archive.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            say(f"WARNING: {self.archive}: {error.strerror}; tried again when the job has ended")
        if self.settings.directory is not None:
            wanted = of_this_job(self.run, time.time_ns())
            return Collector(self.settings.directory, self.archive, wanted)
        try:
            folder = stack.enter_context(
                _private_folder(self.settings.directories(), self.run or "run", self.archive)
            )
        except InputError as error:  # telemetry never takes down its host
            say(f"WARNING: nothing will be archived: {error}")
            return None
        self.environ.update(variables(directory=folder))
        return Collector(folder, self.archive)

    def _finish(self, collector: Collector | None) -> None:
        """When the command has ended: archives what there is, and says what became of it."""
        if collector is None:
            if self.run is not None:
                say(f"run {self.run}: `dodoco show {self.run} --fleet`")
            return
        until = time.monotonic() + self.grace_s
        while collector.live() and time.monotonic() < until:
            time.sleep(min(0.1, self.grace_s))
        collector.look(unended=True)
        _report(collector)
        if self.settings.directory is None:
            _remove_copied(collector)


def collect_abandoned(directories: Sequence[Path]) -> int:
    """Archives what supervisors that were killed left, each to the archive it was to go to.

    Folders whose supervisor lives, or whose job still records, are left alone.

    Args:
        directories: Where recordings of this user lie.

    Returns:
        How many recordings are in their archives now.
    """
    done = 0
    for folder in supervised(directories):
        try:
            archive = Path((folder / TARGET).read_text(encoding="utf-8"))
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # being made or removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        with os.fdopen(lock, "r+"):
            collector = Collector(folder, archive)
            if collector.live():
                continue
            collector.look(unended=True)
            if collector.copied or collector.problems:
                say("left by a supervisor that was killed:")
                _report(collector)
            done += len(collector.copied)
            _remove_copied(collector)
    return done


def allow_plugin(environ: dict[str, str]) -> None:
    """Adds the plugin to those that vLLM is allowed to load, where the environment names them."""
    allowed = environ.get(ALLOWED_PLUGINS)
    if allowed is not None and PLUGIN not in allowed.split(","):
        environ[ALLOWED_PLUGINS] = ",".join(filter(None, (allowed, PLUGIN)))


def say(text: str) -> None:
    """One line on stderr, which the job's own output does not run into."""
    print(f"dodoco: {text}", file=sys.stderr, flush=True)  # noqa: T201 - stdout is the job's


@contextlib.contextmanager
def _private_folder(directories: Sequence[Path], run: str, archive: Path) -> Iterator[Path]:
    """A folder for the recordings of one job, held by a lock that a killed process lets go of."""
    refusals = []
    for directory in directories:
        try:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            if problem := distrust(directory, shared=False):
                raise InputError(problem)
            base = directory / SUPERVISED
            base.mkdir(mode=0o700, exist_ok=True)
            folder = base / f"{run}-{secrets.token_hex(4)}"
            folder.mkdir(mode=0o700)
            break
        except (OSError, InputError) as error:
            refusals.append(str(error))
    else:
        raise InputError(f"no folder to record in: {'; '.join(refusals)}; set DODOCO_DIR")
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Last: without it nobody takes the folder for an abandoned one.
        (folder / TARGET).write_text(str(archive), encoding="utf-8")
        yield folder
        _remove_if_empty(folder)
    finally:
        os.close(lock)


def _wait(child: int, collector: Collector | None) -> int:
    """Waits for the command, passing on signals and archiving what ends meanwhile."""
    ending = False
    while True:
        info = signal.sigtimedwait({*FORWARDED, signal.SIGCHLD}, _LOOK_S)
        if info is not None and info.si_signo != signal.SIGCHLD and info.si_code != _FROM_KERNEL:
            # The terminal's own signals have reached the command already.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, info.si_signo)
        if info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT):
            ending = True
        while (ended := _reap(child)) is not None:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else EXIT_SIGNAL - code
        if collector is not None and (info is None or info.si_signo != signal.SIGCHLD):
            # Whoever was told to end may be killed next, and this process with it.
            collector.look(unended=ending)


def _reap(child: int) -> tuple[int, int] | None:
    """A child that has ended, and its status: process 1 of a container has others' children too."""
    pid, status = os.waitpid(-1 if os.getpid() == 1 else child, os.WNOHANG)
    return (pid, status) if pid else None


def _report(collector: Collector) -> None:
    copied = len(collector.copied) + len(collector.partly)
    if copied:
        noun = "recording" if copied == 1 else "recordings"
        say(f"{copied} {noun} in {collector.archive}: `dodoco show {collector.archive} --last 30s`")
    elif not collector.problems:
        say("the job made no recording: does it call attach() or capture_alltoall()?")
    for path in collector.partly:
        say(f"{path} is still being written, by a process that the job left: copied as it is now")
    for path, problem in collector.problems.items():
        say(f"ERROR: not archived, and kept: {path}: {problem}")


def _remove_copied(collector: Collector) -> None:
    for path in collector.copied:
        path.unlink(missing_ok=True)
    _remove_if_empty(collector.folder)


def _remove_if_empty(folder: Path) -> None:
    """Removes a private folder that holds nothing but this module's own files."""
    try:
        if {path.name for path in folder.iterdir()} <= {LOCK, TARGET}:
            for name in (TARGET, LOCK):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    except FileNotFoundError:
        return  # the archive has taken what was left in it, and the folder with it
    except OSError as error:
        say(f"{folder} stays: {error.strerror}")
