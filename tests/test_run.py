"""`dodoco run`: the job's exit status, its signals, and its recordings in the archive whatever ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import planted
from dodoco_ext import cli, settings
from dodoco_ext.archive import Collector, copy_recording
from dodoco_ext.errors import InputError
from dodoco_ext.fleet import Fleet, run_of
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings, supervised
from namespaces import inside, needs_root

pytestmark = pytest.mark.timeout(120)
HERE = Path(__file__).parent
WAIT_S = 60.0

# Records passes until it is told to end; the arguments are what to do then.
JOB = """
import os, signal, sys, time
import planted
made = planted.Planted(planted.layers(2))
made.route_all([4, 4])
print(made.path, flush=True)
"""
CLOSES = JOB + "made.close(); sys.exit(int(sys.argv[1]))"
KILLS_ITSELF = JOB + "os.kill(os.getpid(), signal.SIGKILL)"
SLEEPS = JOB + "time.sleep(600)"
ASKS = (
    JOB
    + """
def end(number, frame):
    print("told", number, flush=True)
    made.close()
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
print("ready", flush=True)
time.sleep(600)
"""
)
LEAVES_ONE_BEHIND = (
    "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True,"
    " stderr=subprocess.DEVNULL)\n"
    "print(child.pid, child.stdout.readline().strip(), flush=True)\n"
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Without DODOCO_DIR, and with a home of its own in place of /dev/shm."""
    monkeypatch.delenv("DODOCO_DIR")
    shared_memory = tempfile.mkdtemp(prefix="dodoco-tests-", dir="/dev/shm")
    monkeypatch.setenv("TEST_SHARED_MEMORY", shared_memory)
    monkeypatch.setattr(settings, "SHARED_MEMORY", Path(shared_memory))
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", paths)
    yield dict(os.environ)
    shutil.rmtree(shared_memory)


def command(*arguments: object, archive: Path | None, grace: float = 5.0) -> list[str]:
    options = [] if archive is None else ["--archive", str(archive), "--grace", str(grace)]
    start = (
        "import os, pathlib, sys; from dodoco_ext import cli, settings; "
        "settings.SHARED_MEMORY = pathlib.Path(os.environ['TEST_SHARED_MEMORY']); "
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, "run", *options, "--", *map(str, arguments)]


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def finished(line: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, env=environ, capture_output=True, text=True, check=False, timeout=WAIT_S
    )


@contextlib.contextmanager
def started(line: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def archived(archive: Path) -> list[Reader]:
    # A supervisor that still runs may be copying this instant; nothing unfinished stays.
    until(lambda: not [path for path in archive.iterdir() if path.name.startswith(".")])
    return [Reader(path) for path in sorted(archive.glob("*.dodoco"))]


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- The end of the job --------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_is_archived_and_its_status_returned(
    code: int, environment: dict[str, str], tmp_path: Path
) -> None:
    archive = tmp_path / "deep" / "archive"
    done = finished(command(*python(CLOSES, code), archive=archive), environment)
    assert done.returncode == code
    (reader,) = archived(archive)
    assert reader.state == "closed"
    assert [layer.passes for layer in reader.snapshot().layers] == [2, 2]
    source = Path(done.stdout.strip())
    assert not source.exists()
    assert not source.parent.exists()
    assert f"1 recording in {archive}: `dodoco show {archive} --last 30s`" in done.stderr
    assert source.name.startswith(run_of(reader))


def test_a_job_that_is_killed_is_archived(environment: dict[str, str], tmp_path: Path) -> None:
    done = finished(command(*python(KILLS_ITSELF), archive=tmp_path / "a"), environment)
    assert done.returncode == 128 + signal.SIGKILL
    (reader,) = archived(tmp_path / "a")
    assert reader.state == "dead"
    assert len(reader.records()) == 4


def test_the_recording_is_private_while_it_is_made_and_as_wide_as_others_after(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with started(command(*python(ASKS), archive=tmp_path / "a"), environment) as job:
        path = Path(line_of(job))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert line_of(job) == "ready"
        assert [r.path for r in Fleet.open(run_of(Reader(path))).ranks.values()] == [path]
        job.send_signal(signal.SIGTERM)
        assert line_of(job) == f"told {int(signal.SIGTERM)}"
        assert job.wait(WAIT_S) == 7
    (reader,) = archived(tmp_path / "a")
    assert reader.path.stat().st_mode & 0o777 == 0o640


PRINTS = "import os; print(os.environ['DODOCO'], os.environ.get('VLLM_PLUGINS'))"


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "1 None"),
        ({"DODOCO": "0"}, "0 None"),
        ({"VLLM_PLUGINS": "other"}, "1 other,dodoco"),
        ({"VLLM_PLUGINS": ""}, "1 dodoco"),
        ({"VLLM_PLUGINS": "dodoco,other"}, "1 dodoco,other"),
    ],
)
def test_engines_that_load_plugins_are_recorded_unless_the_environment_says_no(
    given: dict[str, str], seen: str, environment: dict[str, str]
) -> None:
    clean = {k: v for k, v in environment.items() if k not in ("DODOCO", "VLLM_PLUGINS")}
    done = finished(command(*python(PRINTS), archive=None), {**clean, **given})
    assert done.stdout.strip() == seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_job(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    with started(command(*python(ASKS), archive=tmp_path / "a"), environment) as job:
        line_of(job)
        assert line_of(job) == "ready"
        job.send_signal(number)
        assert line_of(job) == f"told {int(number)}"
        assert job.wait(WAIT_S) == 7
    assert archived(tmp_path / "a")[0].state == "closed"


def test_a_job_told_to_end_is_archived_before_it_does(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A scheduler's SIGTERM may be followed by a SIGKILL to all, before anybody can react."""
    ignores = JOB + "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\n"
    job_line = command(*python(ignores + "time.sleep(600)"), archive=tmp_path / "a")
    with started(job_line, environment) as job:
        pid = Reader(line_of(job)).header["owner_pid"]
        assert line_of(job) == "ready"
        job.send_signal(signal.SIGTERM)
        until(lambda: (tmp_path / "a").exists() and archived(tmp_path / "a"))
        job.kill()
        os.kill(pid, signal.SIGKILL)
    assert len(archived(tmp_path / "a")[0].records()) == 4


def test_what_the_job_leaves_behind_is_archived_as_it_is(
    environment: dict[str, str], tmp_path: Path
) -> None:
    line = command(*python(LEAVES_ONE_BEHIND, SLEEPS), archive=tmp_path / "a", grace=0.2)
    done = finished(line, environment)
    pid, path = done.stdout.split()
    try:
        assert done.returncode == 0
        assert len(archived(tmp_path / "a")[0].records()) == 4
        assert "still being written" in done.stderr
        assert Path(path).exists()
    finally:
        os.kill(int(pid), signal.SIGKILL)
    until(lambda: Reader(path).state == "dead")
    done = finished(command(*python("pass"), archive=tmp_path / "b"), environment)
    assert "left by a supervisor that was killed" in done.stderr
    assert len(archived(tmp_path / "a")) == 1
    assert not Path(path).exists()


def test_a_killed_supervisor_leaves_the_job_alone_and_the_next_archives_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with started(command(*python(SLEEPS), archive=tmp_path / "a"), environment) as job:
        path = Path(line_of(job))
        job.kill()
        job.wait()
        reader = Reader(path)
        assert reader.state == "live"
        done = finished(command(archive=tmp_path / "b")[:-1], environment)
        assert done.returncode == 0
        assert path.exists()
        os.kill(reader.header["owner_pid"], signal.SIGKILL)
        until(lambda: reader.state == "dead")
    done = finished(command(archive=tmp_path / "b")[:-1], environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert not (tmp_path / "b").exists()
    (kept,) = archived(tmp_path / "a")
    assert (kept.uuid, kept.state) == (reader.uuid, "dead")
    assert not path.parent.exists()


def test_a_folder_of_ones_own_keeps_its_recordings_and_only_the_jobs_are_archived(
    environment: dict[str, str], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DODOCO_DIR", str(recordings))
    other = planted.recording(planted.layers(1))
    (recordings / "another.r00000.00.dodoco").write_bytes(b"no recording" * 1000)
    environ = {**environment, "DODOCO_DIR": str(recordings), "DODOCO_RUN": "mine"}
    done = finished(command(*python(CLOSES, 0), archive=tmp_path / "a"), environ)
    (reader,) = archived(tmp_path / "a")
    assert run_of(reader) == "mine"
    assert Path(done.stdout.strip()).exists()
    assert other.exists()


# --- When the archive fails ----------------------------------------------------------------------


@needs_root
def test_a_full_archive_loses_nothing_and_changes_no_status(
    environment: dict[str, str], tmp_path: Path
) -> None:
    archive = tmp_path / "small"
    archive.mkdir()
    setup = f"mount -t tmpfs -o size=64k none {archive}"
    shown = f"ls -A {archive} >&2; exit $code"
    line = inside(
        "sh", "-c", f'"$@"; code=$?; {shown}', "sh",
        *command(*python(CLOSES, 5), archive=archive), setup=setup,
    )  # fmt: skip
    done = finished(line, environment)
    source = Path(done.stdout.strip())
    try:
        assert done.returncode == 5
        assert f"ERROR: not archived, and kept: {source}: " in done.stderr
        assert "No space left on device" in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("dodoco: ERROR")  # no file is left
        assert Reader(source).state == "closed"
        again = finished(command(archive=tmp_path)[:-1], environment)
        assert "1 recording in" in again.stderr
        assert archived(archive)[0].state == "closed"
        assert not source.exists()
    finally:
        source.unlink(missing_ok=True)


def test_an_archive_that_cannot_be_made_stops_no_job(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("a file")
    done = finished(command(*python(CLOSES, 4), archive=tmp_path / "a"), environment)
    assert done.returncode == 4
    assert "WARNING" in done.stderr
    source = Path(done.stdout.strip())
    assert f"not archived, and kept: {source}" in done.stderr
    (tmp_path / "a").unlink()
    finished(command(archive=tmp_path)[:-1], environment)
    assert archived(tmp_path / "a")[0].state == "closed"


def test_another_recording_is_never_overwritten(tmp_path: Path) -> None:
    first, second = (planted.recording(planted.layers(1)) for _ in range(2))
    archive = tmp_path / "a"
    archive.mkdir()
    assert copy_recording(first, archive).read_bytes() == first.read_bytes()
    assert copy_recording(first, archive).stat().st_mtime_ns == first.stat().st_mtime_ns
    (archive / first.name).write_bytes(second.read_bytes())
    collector = Collector(first.parent, archive, lambda path, _: path == first)
    collector.look()
    assert list(collector.problems) == [first]
    assert "no copy of" in collector.problems[first]
    assert Reader(archive / first.name).uuid == Reader(second).uuid
    with pytest.raises(InputError, match="no copy of"):
        copy_recording(first, archive)


def test_a_damaged_recording_is_archived_too(recordings: Path, tmp_path: Path) -> None:
    path = planted.recording(planted.layers(1))
    os.truncate(path, 8192)
    collector = Collector(recordings, tmp_path / "a")
    collector.look()
    assert not collector.copied
    collector.look(unended=True)
    assert (tmp_path / "a" / path.name).stat().st_size == 8192


def test_a_live_recording_waits(recordings: Path, tmp_path: Path) -> None:
    made = planted.Planted(planted.layers(1))
    collector = Collector(recordings, tmp_path / "a")
    collector.look()
    assert (collector.live(), collector.copied) == ([made.path], {})
    made.route_all([4])
    made.close()
    collector.look()
    assert list(collector.copied) == [made.path]
    assert len(Reader(tmp_path / "a" / made.path.name).records()) == 1


# --- What it says --------------------------------------------------------------------------------


def test_without_an_archive_the_run_has_a_name(
    environment: dict[str, str], recordings: Path
) -> None:
    environ = {**environment, "DODOCO_DIR": str(recordings)}
    done = finished(command(*python(CLOSES, 0), archive=None), environ)
    reader = Reader(done.stdout.strip())
    assert f"`dodoco show {run_of(reader)} --fleet`" in done.stderr
    assert reader.path.parent == recordings


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"DODOCO_RUN": "given"}, "given"),
        ({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2"}, "slurm-17-2"),
    ],
)
def test_a_name_that_others_share_is_taken(
    environ: dict[str, str], name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = finished(command(*python(CLOSES, 0), archive=tmp_path / "a"), {**environment, **environ})
    assert Path(done.stdout.strip()).name.startswith(f"{name}.r")


def test_a_command_that_records_nothing_is_told(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = finished(command("true", archive=tmp_path / "a"), environment)
    assert done.returncode == 0
    assert "made no recording" in done.stderr


@pytest.mark.parametrize(("name", "code"), [("/no/such/program", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_started(
    name: str, code: int, environment: dict[str, str], tmp_path: Path
) -> None:
    environ = {**environment, "DODOCO_RUN": "no-start"}
    done = finished(command(name, archive=tmp_path / "a"), environ)
    assert done.returncode == code
    assert f"{name} cannot be started" in done.stderr
    assert not [p for p in supervised(Settings().directories()) if p.name.startswith("no-start-")]


def test_options_of_the_command_are_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    shows = python("import sys; print(sys.argv[1:])", "--debug", "--archive", "x")
    line = command(*shows, archive=tmp_path / "a")
    for without in (line, [part for part in line if part != "--"]):
        assert finished(without, environment).stdout.strip() == "['--debug', '--archive', 'x']"


def test_no_command_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run"]) == cli.EXIT_ERROR
    assert "no command" in capsys.readouterr().err
