"""`dodoco doctor`: what it finds, what it advises, and that it leaves everything as it was."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import planted
from dodoco_ext import _C, cli, settings
from dodoco_ext.errors import RecordingError
from dodoco_ext.settings import Settings
from dodoco_ext.views import checks, doctor, file_systems, packages, places
from dodoco_ext.views.checks import Check
from namespaces import ENVIRONMENT, inside, needs_root, python

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def find(name: str) -> Check:
    """The check of that name."""
    checks = [check for check in doctor.examine().checks if check.name == name]
    assert len(checks) == 1, checks
    return checks[0]


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all packages were there, whatever this environment holds."""
    monkeypatch.setattr(checks, "installed_version", lambda name: "99.1")


@pytest.mark.usefixtures("everything_installed")
def test_where_recording_works_it_says_so(
    recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Recording works here.\n")
    assert "trial recording" in out
    assert not recordings.exists(), "the folder is the recorder's to create"
    assert list(recordings.parent.iterdir()) == [], "the trial recording is removed"


@pytest.mark.usefixtures("everything_installed")
def test_json_has_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "dodoco.doctor/1"
    assert found["can_record"] is True
    assert set(found) == {"schema", "can_record", "checks", "settings"}
    for check in found["checks"]:
        assert set(check) == {"section", "name", "status", "value", "advice"}
        assert check["status"] in ("ok", "off", "warning", "error")
    assert [s["name"] for s in found["settings"]] == [name for name, _, _ in settings.TABLE]


def test_without_torch_recording_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        checks, "installed_version", lambda name: None if name == "torch" else "99.1"
    )
    assert cli.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Recording would not work here: see the 1 thing marked 'error' above." in out
    assert find("torch").advice.startswith("install the torch that fits this machine")


def test_a_missing_extra_is_off_and_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: None)
    check = find("matplotlib")
    assert check.status == "off"
    assert check.advice == "pip install 'dodoco-ext[report]'"


def test_whatever_is_not_well_comes_with_what_to_do(
    recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: None)
    monkeypatch.setattr(checks, "DRIVER", recordings / "nowhere")
    monkeypatch.setenv("DODOCO_MAX_BYTES", str(1 << 14))
    monkeypatch.setenv("DODOCO_NONSENSE", "1")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    recordings.mkdir()
    (recordings / "x.dodoco").write_text("text")
    found = [check for check in doctor.examine().checks if check.status != "ok"]
    assert {check.status for check in found} == {"off", "warning", "error"}
    assert len(found) > 15
    assert [check for check in found if not check.advice] == []


def test_an_old_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: "2.9.1+cpu")
    check = find("torch")
    assert check.status == "warning"
    assert "2.9.1+cpu, older than 2.11" in check.value


@pytest.mark.parametrize(
    ("version", "older"),
    [("2.11", False), ("2.11.0a0+nv26.1", False), ("2.9", True), ("3", False), ("odd", False)],
)
def test_versions_are_compared_by_their_numbers(version: str, older: bool) -> None:
    assert packages.is_older(version, (2, 11)) is older


@pytest.mark.skipif(not PYPROJECT.exists(), reason="runs in a checkout")
def test_the_packages_are_those_of_the_extras() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    wanted = {}
    for extra in set(extras) - {"dev"}:
        for requirement in extras[extra]:
            name, _, minimum = requirement.partition(">=")
            wanted[name] = (extra, tuple(map(int, minimum.split("."))) if minimum else ())
    assert {p.name: (p.extra, p.minimum) for p in packages.PACKAGES if p.extra} == wanted


def test_a_broken_module_is_diagnosed_rather_than_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dodoco_ext

    monkeypatch.delattr(dodoco_ext, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "dodoco_ext._C", None)
    assert cli.run(["doctor"]) == 1
    assert "does not load" in capsys.readouterr().out
    assert "reinstall" in find("C++ module").advice


def test_a_module_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "version", "0.0.7")
    check = find("C++ module")
    assert (check.status, "0.0.7" in check.value) == ("error", True)


@pytest.mark.parametrize(("version", "status"), [((3, 10), "warning"), ((3, 14), "warning")])
def test_a_python_that_nobody_tested(
    version: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find("Python").status == "ok"
    monkeypatch.setattr(sys, "version_info", version)
    assert find("Python").status == status
    assert find("Python").advice == "use Python 3.11 to 3.13, the tested ones"


# --- GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver and two GPUs, whatever this machine has; returns the folder of the devices."""
    for name in ("version", "nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(checks, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(checks, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_is_seen(gpu: Path) -> None:
    assert (find("GPU").status, find("GPU").value) == ("ok", "nvidia0, nvidia1")


def test_without_a_driver(gpu: Path) -> None:
    (gpu / "version").unlink()
    check = find("GPU")
    assert check.status == "off"
    assert "no NVIDIA driver is loaded" in check.value
    assert "install its driver" in check.advice


def test_a_container_without_its_gpus(gpu: Path) -> None:
    for device in gpu.glob("nvidia[0-9]"):
        device.unlink()
    check = find("GPU")
    assert (check.status, "no GPU is visible" in check.value) == ("off", True)
    assert "--gpus all" in check.advice


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert (find("GPU").status, find("GPU").value) == (
        "off",
        f"hidden by CUDA_VISIBLE_DEVICES={value!r}",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find("GPU").status == "ok"


def test_a_build_without_cuda_says_what_that_means(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "has_cuda", False)
    assert find("CUDA code").status == "warning", "there is a GPU that it cannot record on"
    (gpu / "version").unlink()
    assert find("CUDA code").status == "off"
    assert "models on the CPU" in find("CUDA code").advice
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "cuda_archs", "9.0")
    assert (find("CUDA code").status, find("CUDA code").value) == ("ok", "for 9.0")


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_where_a_file_is(recordings: Path) -> None:
    recordings.write_text("")
    check = find(str(recordings))
    assert check.status == "error"
    assert "is not a folder" in check.advice


def test_a_place_that_cannot_be_written_to(
    recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "is not writable" in find(str(recordings)).advice
    recordings.mkdir()
    assert "is not writable" in find(str(recordings)).advice
    assert not doctor.examine().can_record


def test_a_private_folder_that_others_may_enter(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    place = places.examine(folder, shared=False, max_bytes=8 << 20)
    assert "is not private" in place.problem
    folder.chmod(0o700)
    assert places.examine(folder, shared=False, max_bytes=8 << 20).problem == ""
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert places.examine(link, shared=False, max_bytes=8 << 20).problem != ""


def test_the_second_choice_is_taken_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_text("")
    monkeypatch.setattr(Settings, "directories", lambda self: (bad, good))
    assert (find(str(bad)).status, find(str(good)).status) == ("warning", "warning")
    assert find(str(good)).advice == f"it is used because {bad} cannot be"
    assert find("trial recording").status == "ok"


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of mounts of the test's own."""
    table = tmp_path / "mounts"
    table.write_text("")
    monkeypatch.setattr(file_systems, "MOUNTS", table)
    return table


def test_the_file_system_of_a_folder(mounts: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "a b é"
    (spaced / "c").mkdir(parents=True)
    lines = [("/", "overlay"), (tmp_path, "ext4"), (str(spaced).replace(" ", "\\040"), "nfs4")]
    mounts.write_text("".join(f"x {point} {kind} rw,a 0 0\n" for point, kind in lines))
    assert file_systems.kind_of(Path("/")) == "overlay"
    assert file_systems.kind_of(tmp_path) == "ext4"
    assert file_systems.kind_of(spaced / "c") == "nfs4"
    with mounts.open("a") as file:
        file.write(f"y {tmp_path} xfs rw 0 0\n")
    assert file_systems.kind_of(tmp_path) == "xfs", "the later mount hides the earlier"
    mounts.unlink()
    assert file_systems.kind_of(tmp_path) == ""


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "lustre", "fuse.sshfs", "9p"])
def test_a_network_file_system(kind: str, mounts: Path, recordings: Path) -> None:
    mounts.write_text(f"x / overlay rw 0 0\nserver:/x {recordings.parent} {kind} rw 0 0\n")
    check = find(str(recordings))
    assert check.status == "warning"
    assert f"{kind} is a network file system, where a live recording can look dead" in check.advice
    assert "set DODOCO_DIR to a tmpfs" in check.advice
    assert doctor.examine().can_record


def test_a_disk_is_fine_for_the_cpu_only(
    mounts: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts.write_text("x / ext4 rw 0 0\n")
    monkeypatch.setattr(places, "has_gpu", lambda: False)
    assert find(str(recordings)).status == "ok"
    monkeypatch.setattr(places, "has_gpu", lambda: True)
    assert find(str(recordings)).status == "warning"
    assert "a GPU writes to tmpfs only" in find(str(recordings)).advice
    mounts.write_text("x / tmpfs rw 0 0\n")
    assert find(str(recordings)).status == "ok"


def test_a_shared_folder_that_its_group_cannot_read_or_anybody_can_write(recordings: Path) -> None:
    recordings.mkdir()
    for mode, advice in (
        (0o2750, ""),
        (
            0o700,
            f"its group cannot read it, so no other user's reader can: chmod 2750 {recordings}",
        ),
        (0o2777, f"anybody may remove or replace recordings in it: chmod o-w {recordings}"),
        (0o3777, ""),
    ):
        recordings.chmod(mode)
        check = find(str(recordings))
        assert (check.advice, check.status) == (advice, "warning" if advice else "ok")


def test_where_locks_do_not_hold(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live recording would look dead, and be pruned."""
    monkeypatch.setattr(_C, "owner_alive", lambda path: False)
    check = find(str(recordings))
    assert check.status == "error"
    assert "locks do not hold" in check.advice
    assert list(recordings.parent.iterdir()) == []


@needs_root
@pytest.mark.parametrize(
    ("setup", "value", "advice"),
    [
        ("mount -t tmpfs -o size=64m tmpfs /dev/shm", "only 64 MiB", "--shm-size=1g"),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", "is mounted read-only", "mount it writable"),
        (
            "mount --bind /usr /dev/shm; mount -o remount,bind,ro /dev/shm",
            "not memory",
            "mount a tmpfs there",
        ),
        (
            "mount -t tmpfs -o size=128m tmpfs /dev/shm; head -c 120M /dev/zero > /dev/shm/x",
            "8 MiB of 128 MiB free",
            "remove what is not needed",
        ),
    ],
    ids=["small", "read-only", "disk", "full"],
)
def test_shared_memory_as_it_should_not_be(
    setup: str, value: str, advice: str, tmp_path: Path
) -> None:
    code = "from dodoco_ext.cli import main; main()"
    done = subprocess.run(
        inside(*python(code, "doctor", "--json"), setup=setup),
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    (check,) = (c for c in json.loads(done.stdout)["checks"] if c["name"] == "/dev/shm")
    assert check["status"] == "warning"
    assert value in check["value"]
    assert advice in check["advice"]


def test_shared_memory_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DODOCO_DIR")
    monkeypatch.setattr(settings, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(settings.tempfile, "tempdir", str(tmp_path))
    check = find(str(tmp_path / "shm"))
    assert (check.value, check.advice) == (
        "does not exist",
        "mount a tmpfs there, or set DODOCO_DIR",
    )
    assert find(str(tmp_path / "shm" / f"dodoco-{os.getuid()}")).status == "warning"
    assert find(str(tmp_path / f"dodoco-{os.getuid()}")).status == "warning", "the second choice"


def test_shared_memory_does_not_matter_where_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings, "SHARED_MEMORY", tmp_path / "shm")
    assert str(tmp_path / "shm") not in [check.name for check in doctor.examine().checks]


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("max_bytes", "status"), [(1 << 16, "warning"), (1 << 14, "error"), (8 << 20, "ok")]
)
def test_the_recording_that_would_result(
    max_bytes: int, status: str, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DODOCO_MAX_BYTES", str(max_bytes))
    check = find(str(recordings))
    assert check.status == status
    assert ("DODOCO_MAX_BYTES" in check.advice) == (status != "ok")
    assert doctor.examine().can_record == (status != "error")


def test_settings_in_effect_and_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("DODOCO_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "9")
    found = {s.name: (s.value, s.source) for s in doctor.examine().settings}
    assert found["DODOCO_RANK"] == ("3", "$RANK")
    assert found["DODOCO_WORLD_SIZE"] == ("4", "environment")
    assert found["DODOCO_RECORD_EVERY"] == ("1", "default")
    assert "several ranks" in find("DODOCO_RUN").value


def test_an_invalid_setting_is_an_error_and_the_rest_is_still_examined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DODOCO_RECORD_EVERY", "0")
    found = doctor.examine()
    assert not found.can_record
    assert "DODOCO_RECORD_EVERY=0 is out of range" in find("environment").value
    assert {s.name: s.value for s in found.settings}["DODOCO_RECORD_EVERY"] == "0"
    assert "trial recording" in [check.name for check in found.checks]


def test_a_misspelt_setting_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DODOCO_RECORD_EVRY", "2")
    assert find("DODOCO_RECORD_EVRY").advice == "did you mean DODOCO_RECORD_EVERY?"


def test_a_rank_outside_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DODOCO_RUN", "run")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find("DODOCO_RANK").value == "rank 2 of 2 ranks"


@pytest.mark.parametrize(
    ("variable", "value"), [("TORCHELASTIC_RUN_ID", "job-7"), ("SLURM_JOB_ID", "4711")]
)
def test_a_launcher_names_the_run(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find("DODOCO_RUN").advice.startswith("set DODOCO_RUN to the same text on every rank")
    monkeypatch.setenv(variable, value)
    found = doctor.examine()
    assert "DODOCO_RUN" not in [check.name for check in found.checks]
    (run,) = (s for s in found.settings if s.name == "DODOCO_RUN")
    assert value in run.value
    assert run.source == f"${variable}"


# --- recordings ---------------------------------------------------------------------------------


def test_recordings_are_counted_and_broken_ones_named(recordings: Path) -> None:
    whole = planted.recording(planted.layers(1)).read_bytes()
    live = planted.Planted(planted.layers(1))
    # What a file is, and what is to be done with it.
    broken = {
        "unfinished": (bytes(8192), "remove it"),
        "foreign": (b"text" * 4096, "move it to another folder"),
        "version": (whole[:8] + b"\x63" + whole[9:], "read it with the dodoco-ext that wrote it"),
        "truncated": (whole[: len(whole) // 2], "copy it again"),
        "damaged": (whole[:28] + b"\xff" + whole[29:], "remove it"),
    }
    for state, (content, _) in broken.items():
        (recordings / f"{state}.r00000.00.dodoco").write_bytes(content)
    found = find("found")
    assert found.value == (
        "1 closed, 1 damaged, 1 foreign, 1 live, 1 truncated, 1 unfinished, 1 version"
    )
    for state, (_, advice) in broken.items():
        check = find(f"{state}.r00000.00.dodoco")
        assert check.status == "warning"
        assert check.value.startswith(f"{state}: {recordings}")
        assert advice in check.advice
    live.close()


def test_a_recording_that_is_being_created_is_only_not_there_yet(recordings: Path) -> None:
    recordings.mkdir()
    path = recordings / "new.r00000.00.dodoco"
    path.write_bytes(bytes(8192))
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check = find(path.name)
    assert check.status == "off"
    assert check.value.startswith("creating: ")
    assert "look again" in check.advice


def test_dead_recordings_are_explained(recordings: Path) -> None:
    assert find("found").value == "none"
    planted.dead_recording(recordings)
    assert find("found").value == "1 dead"
    assert "stays readable" in find("found").advice


def test_a_folder_that_may_not_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directories: object) -> None:
        raise RecordingError("cannot list /shared: Permission denied", "unreadable")

    monkeypatch.setattr("dodoco_ext.sources.find", refuse)
    check = find("not listed")
    assert (check.status, check.value) == ("warning", "cannot list /shared: Permission denied")


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(checks, "installed_version", lambda name: None)
    cli.run(["doctor"])
    lines: list[Any] = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= width
    assert not any("…" in line for line in lines)
