"""Several models side by side: one table, the sentences that it supports, and a page of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite
from pathlib import Path

from dodoco_ext.observatory.findings import verdict
from dodoco_ext.observatory.result import Interval, Result
from dodoco_ext.observatory.whole import write_whole

_TEMPLATE = "templates/comparison.html.j2"


@dataclass(frozen=True)
class Row:
    """One model in the table.

    Attributes:
        name: Its short name, also that of its folder.
        architecture: Its class.
        loss: Of the first real text, nats a token.
        corrected: Corrected Gini of each condition, by name.
        ratio: Corrected Gini of the first mock over the first real text; nan where there is none.
        interval: Its 95 % interval.
    """

    name: str
    architecture: str
    loss: float
    corrected: dict[str, float]
    ratio: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """Where the ratio lies relative to 1 (`findings.verdict`)."""
        return verdict(self.interval)


def rows(results: Mapping[str, Result]) -> list[Row]:
    """The table: one row a model."""
    table = []
    for name, result in results.items():
        mock, real = (result.of_kind(kind)[:1] for kind in ("mock", "real"))
        ratio = result.ratio(mock[0].name, real[0].name) if mock and real else None
        table.append(
            Row(
                name=name,
                architecture=result.model.architecture,
                loss=real[0].loss if real else float("nan"),
                corrected={c.name: c.overall.corrected_gini for c in result.conditions},
                ratio=float("nan") if ratio is None else ratio.corrected,
                interval=(float("nan"),) * 2 if ratio is None else ratio.corrected_interval,
            )
        )
    return table


def sentences(results: Mapping[str, Result]) -> list[str]:
    """What the table says, as its numbers have it."""
    table = rows(results)
    first = next(iter(results.values()))
    mock, real = (first.of_kind(kind)[:1] for kind in ("mock", "real"))
    said = []
    if mock and real:
        count = {kind: [r.name for r in table if r.verdict == kind] for kind in _VERDICTS}
        parts = [
            f"{_VERDICTS[kind]} {len(names)} ({', '.join(names)})"
            for kind, names in count.items()
            if names
        ]
        said.append(
            f"Over {len(table)} models, {mock[0].name} against {real[0].name}, corrected Gini: "
            f"{'; '.join(parts)}."
        )
    for condition in real:
        ordered = sorted(table, key=lambda row: row.corrected[condition.name])
        said.append(
            f"On {condition.name} the most even router is that of {ordered[0].name} "
            f"({ordered[0].corrected[condition.name]:.3f}), the least even that of "
            f"{ordered[-1].name} ({ordered[-1].corrected[condition.name]:.3f})."
        )
    said.append(
        "Each is one small model of one seed: that its architecture is the reason does not follow."
    )
    return said


_VERDICTS = {
    "above": "overestimated in",
    "below": "underestimated in",
    "level": "neither in",
    "unknown": "undecided in",
}


def write_comparison(results: Mapping[str, Result], out: Path) -> tuple[Path, Path]:
    """Writes `report.html` and `results.json` for several models.

    Args:
        results: By short name; the report of each is linked as `NAME/report.html`.
        out: Folder; created if missing.

    Returns:
        The page and the numbers.
    """
    from jinja2 import Environment, StrictUndefined

    out.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fixed"] = fixed
    source = files("dodoco_ext.observatory").joinpath(_TEMPLATE).read_text("utf-8")
    first = next(iter(results.values()))
    page, numbers = out / "report.html", out / "results.json"
    rendered = environment.from_string(source).render(
        rows=rows(results),
        conditions=first.conditions,
        first=first,
        sentences=sentences(results),
    )
    with write_whole(page) as partial:
        partial.write_text(rendered, encoding="utf-8")
    with write_whole(numbers) as partial:
        partial.write_text(to_json(results) + "\n", encoding="utf-8")
    return page, numbers


def to_json(results: Mapping[str, Result]) -> str:
    """All results as strict JSON, by short name."""
    return json.dumps({name: json.loads(result.to_json()) for name, result in results.items()})


def fixed(value: float, digits: int = 3) -> str:
    """A number for a table, or a dash."""
    return f"{value:.{digits}f}" if isfinite(value) else "–"
