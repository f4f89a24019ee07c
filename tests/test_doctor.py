"""`dodoco doctor`: what it finds, what it advises, and that it leaves everything as it was."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import planted
from dodoco_ext import cli, settings
from dodoco_ext.settings import Settings
from dodoco_ext.views import doctor, packages, places
from dodoco_ext.views.doctor import Check

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def find(name: str) -> Check:
    """The check of that name."""
    checks = [check for check in doctor.examine().checks if check.name == name]
    assert len(checks) == 1, checks
    return checks[0]


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all packages were there, whatever this environment holds."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: "99.1")


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
        doctor, "installed_version", lambda name: None if name == "torch" else "99.1"
    )
    assert cli.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Recording would not work here: see the 1 thing marked 'error' above." in out
    assert find("torch").advice.startswith("install the torch that fits this machine")


def test_a_missing_extra_is_off_and_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    check = find("matplotlib")
    assert check.status == "off"
    assert check.advice == "pip install 'dodoco-ext[report]'"


def test_an_old_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.9.1+cpu")
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
    for extra in set(extras) - {"dev", "top"}:  # top needs what the base install has
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
    from dodoco_ext import _C

    monkeypatch.setattr(_C, "version", "0.0.7")
    check = find("C++ module")
    assert (check.status, "0.0.7" in check.value) == ("error", True)


def test_a_build_without_cuda_says_what_that_means(monkeypatch: pytest.MonkeyPatch) -> None:
    from dodoco_ext import _C

    monkeypatch.setattr(_C, "has_cuda", False)
    assert find("CUDA").status in ("off", "warning")
    assert "models on the CPU" in find("CUDA").advice
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "cuda_archs", "9.0")
    assert find("CUDA").value.startswith("built for 9.0")


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
    assert find("trial recording").status == "ok"


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


def test_a_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(total=64 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check = find(str(settings.SHARED_MEMORY))
    assert "only 64 MiB" in check.value
    assert "--shm-size" in check.advice


def test_recordings_are_counted_and_broken_ones_named(recordings: Path) -> None:
    planted.recording(planted.layers(1))
    live = planted.Planted(planted.layers(1))
    broken = recordings / "broken.r00000.00.dodoco"
    broken.write_bytes(b"\0" * 8192)
    assert find("found").value == "1 closed, 1 live, 1 unreadable"
    assert "still being created" in find(broken.name).value
    live.close()


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    cli.run(["doctor"])
    lines: list[Any] = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= width
    assert not any("…" in line for line in lines)
