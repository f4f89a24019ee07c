"""`dodoco show` as a test runs it: what it prints, and its JSON, strictly read."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pytest

from dodoco_ext import cli

Capture = pytest.CaptureFixture[str]


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def show(capsys: Capture, *arguments: object) -> str:
    assert cli.run(["show", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def show_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    found = json.loads(show(capsys, *arguments, "--json"), parse_constant=refuse)
    assert isinstance(found, dict)
    return found
