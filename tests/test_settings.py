"""Every setting: its default, its effect, and what is said to a value that cannot be used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dodoco_ext import settings
from dodoco_ext.errors import InputError
from dodoco_ext.settings import TABLE, Settings, debug, given

PACKAGE = Path(settings.__file__).parent


def test_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings() == Settings(None, 8 << 20, 1, None, 0, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DODOCO_DIR": "/some/where"}, Settings(directory=Path("/some/where"))),
        ({"DODOCO_MAX_BYTES": "65536"}, Settings(max_bytes=65536)),
        ({"DODOCO_RECORD_EVERY": "10"}, Settings(record_every=10)),
        ({"DODOCO_RUN": "job-7_b"}, Settings(run="job-7_b")),
        ({"DODOCO_RANK": "3", "DODOCO_WORLD_SIZE": "8"}, Settings(rank=3, world_size=8)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Settings(rank=2, world_size=4)),
        ({"RANK": "2", "DODOCO_RANK": "0"}, Settings(rank=0)),
        ({"DODOCO_DIR": "", "DODOCO_RUN": "", "DODOCO_RANK": "", "RANK": "5"}, Settings(rank=5)),
        ({"DODOCO_UNHEARD_OF": "1", "HOME": "/"}, Settings()),
    ],
)
def test_a_variable_sets_its_setting(environment: dict[str, str], expected: Settings) -> None:
    assert Settings.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DODOCO_MAX_BYTES", "many"),
        ("DODOCO_MAX_BYTES", "16383"),
        ("DODOCO_MAX_BYTES", "1e6"),
        ("DODOCO_MAX_BYTES", str(1 << 32)),
        ("DODOCO_RECORD_EVERY", "0"),
        ("DODOCO_RECORD_EVERY", "-1"),
        ("DODOCO_RANK", "-1"),
        ("RANK", "zero"),
        ("DODOCO_WORLD_SIZE", "0"),
        ("DODOCO_RUN", "a.b"),
        ("DODOCO_RUN", "../up"),
        ("DODOCO_RUN", "two words"),
        ("DODOCO_RUN", "x" * 65),
        ("DODOCO_RUN", "line\n"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_in_one_line(name: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings.from_environment({name: value})
    message = str(caught.value)
    assert name in message
    assert value.strip() in message
    assert "\n" not in message


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DODOCO_RECORD_EVERY", "5")
    assert Settings.from_environment().record_every == 5


def test_folders_are_shared_memory_then_temporary_unless_one_is_given() -> None:
    first, second = Settings().directories()
    assert first == Path("/dev/shm") / f"dodoco-{os.getuid()}"
    assert second.name == first.name
    assert Settings(directory=Path("x")).directories() == (Path("x"),)


def test_the_table_lists_every_variable_and_nothing_else_reads_them() -> None:
    names = {name for name, _, _ in TABLE}
    source = Path(settings.__file__).read_text()
    assert names == set(re.findall(r"\"(DODOCO(?:_[A-Z_]+)?)\"", source))
    assert all(default and meaning for _, default, meaning in TABLE)
    read = re.compile(r"(environ(\.\w+)?|getenv)\s*[\[(]\s*[\"']DODOCO_")
    readers = {path.name for path in PACKAGE.rglob("*.py") if read.search(path.read_text())}
    assert readers <= {"settings.py"}


def test_defaults_in_the_table_are_the_defaults() -> None:
    defaults = {name: default for name, default, _ in TABLE}
    assert defaults["DODOCO_MAX_BYTES"] == str(Settings().max_bytes)
    assert defaults["DODOCO_RECORD_EVERY"] == str(Settings().record_every)


def test_reading_settings_touches_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    Settings.from_environment({"DODOCO_DIR": str(folder)}).directories()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("", False), ("0", False), ("no", False), ("1", True), ("yes", True)]
)
def test_debug_never_fails(text: str, wanted: bool) -> None:
    assert debug({"DODOCO_DEBUG": text}) is wanted
    assert not debug({})


def test_given_names_misspelt_settings_too() -> None:
    assert given({"DODOCO_RNAK": "1", "HOME": "/", "DODOCO_DIR": "x"}) == {
        "DODOCO_DIR": "x",
        "DODOCO_RNAK": "1",
    }
