"""`dodoco doctor`: what is installed and usable here, what is not, why, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dodoco_ext import settings
from dodoco_ext.errors import InputError
from dodoco_ext.settings import Settings
from dodoco_ext.views import checks, engines, tables
from dodoco_ext.views.checks import ERROR, OFF, OK, WARNING, Check

SCHEMA = "dodoco.doctor/1"
_STYLES = {OK: "green", OFF: "dim", WARNING: "yellow", ERROR: "bold red"}


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
    found = [*checks.installation(), *checks.packages(), *engines.vllm()]
    if problem:
        found.append(Check("Settings", "environment", ERROR, problem, "correct or unset it"))
    if _has_module(found):
        found += [*checks.folders(asked), *checks.recordings(asked)]
    found += checks.environment(asked)
    return Diagnosis(tuple(found), tuple(_settings(asked, valid=not problem)))


def _has_module(found: Iterable[Check]) -> bool:
    return all(check.status != ERROR for check in found if check.name == "C++ module")


def _settings(asked: Settings, *, valid: bool) -> Iterator[Setting]:
    given = settings.given()
    in_effect = {
        "DODOCO": str(int(settings.plugins_wanted())),
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
        elif other == "RUN" and asked.run is not None:
            elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none") not in ("", "none")
            source = "$TORCHELASTIC_RUN_ID" if elastic else "$SLURM_JOB_ID"
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
    if _has_module(diagnosis.checks):
        verdict += " Reading recordings works."
    console.print(verdict, style="bold red")
