"""Writes a grid's page: one file without any outside reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any

from dodoco_ext.observatory import report
from dodoco_ext.observatory.bands import BANDS, PUBLISHED, SCALES, BandResult
from dodoco_ext.observatory.ep_words import ep_sentences
from dodoco_ext.observatory.page.answers import answers
from dodoco_ext.observatory.page.curves import batch_panels, ep_panels, key, unmeasurable
from dodoco_ext.observatory.page.heat import expert_maps, gradient, heat_maps
from dodoco_ext.observatory.page.rows import bands_chart, gap_chart, ratio_chart
from dodoco_ext.observatory.page.tables import spread, tables, text
from dodoco_ext.observatory.page.view import Data, View, interval, number
from dodoco_ext.observatory.published import MODELS, SOURCE

_VERDICTS = {
    "survives": "survives the correction",
    "vanishes": "only in raw Gini: it vanishes with the correction",
    "none": "none that this run can tell",
}


def render(view: View) -> str:
    """The page as text.

    Raises:
        InputError: Jinja2 is missing.
    """
    report.check_dependencies()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    parts = [_part(view, index, model) for index, model in enumerate(view.models)]
    cells = [entry["cell"] for part in parts for entry in part["maps"]]
    for place, entry in enumerate(entry for part in parts for entry in part["maps"]):
        entry["index"] = place
    real = view.names("real")
    raw, corrected = view.bands(), {band.model: band for band in view.bands(corrected=True)}
    return environment.from_string(_template("grid.html.j2")).render(
        view=view,
        css=_template("grid.css"),
        js=_template("grid.js"),
        answers=_all_answers(view),
        findings=view.numbers["findings"],
        heat_maps=heat_maps(view),
        gradient=gradient(),
        map_gradient=report.legend(),
        tokens=view.parameters["batch_size"] * view.parameters["sequence_length"],
        first_real=view.colour(real[0]) if real else 0,
        published=[*_published(view)],
        source=SOURCE,
        edges=PUBLISHED,
        names=BANDS,
        bands=[(band, corrected.get(band.model)) for band in raw],
        bands_chart=str(bands_chart(view, raw, corrected=False)),
        moved=_moved,
        signed=signed,
        dispersion=_dispersion,
        verdicts=_VERDICTS,
        keys=_keys(view),
        per_model=parts,
        tables=tables(view),
        provenance=[*_flat(view.provenance)],
        hover=_hover(cells, [part["maps"] for part in parts]),
    )


def signed(value: Any, ends: Any = None) -> str:
    """A difference with its interval."""
    if not isfinite(number(value)):
        return "–"
    low, high = interval(ends)
    known = isfinite(low) and isfinite(high)
    return f"{number(value):+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if known else "")


def _template(name: str) -> str:
    return files("dodoco_ext.observatory").joinpath("templates", name).read_text("utf-8")


def _all_answers(view: View) -> list[tuple[str | None, Any]]:
    whole: list[str | None] = [None] if len(view.models) > 1 else []
    return [(model, answers(view, model)) for model in [*whole, *view.models]]


def _part(view: View, index: int, model: str) -> Data:
    scans = [(c, view.ep_scans[model, c]) for c in view.names() if (model, c) in view.ep_scans]
    slopes = [(c, s) for c in view.names() if (s := view.batch_scan(model, c)) is not None]
    ratios = ratio_chart(view, model)
    layers = view.facts(model)["num_layers"]
    return {
        "model": model,
        "index": index,
        "ratios": str(ratios) if ratios else "",
        "gaps": [(gap, str(gap_chart(gap))) for gap in view.gaps(model) if gap["steps"]],
        "ep": [str(panel) for panel in ep_panels(view, model)],
        "unmeasurable": unmeasurable([arm for _, scan in scans for arm in scan.arms]),
        "ep_sentences": [(condition, ep_sentences(scan)) for condition, scan in scans],
        "batch": [str(panel) for panel in batch_panels(view, model)],
        "slopes": slopes,
        "maps": expert_maps(view, model),
        "map_height": max(84, min(420, 26 * layers)),
    }


def _published(view: View) -> Iterator[Data]:
    for model in MODELS:
        name = next((m for m in view.models if view.published(m) is model), None)
        found: dict[str, str] = {"real": "–", "mock": "–"}
        for kind in found if name else ():
            cells = view.of_kind(kind, name)
            if cells:
                low = min(cells, key=lambda c: number(c["experts"]["gini"]))
                gini = low["experts"]
                found[kind] = (
                    f"{text(gini['gini'])} ({spread(gini['gini_interval'])}), {low['condition']}"
                )
        yield {
            "model": model,
            "name": name or "not observed",
            "same_mixer": name == model.zoo,
            **found,
        }


def _moved(band: BandResult) -> str:
    factors = [f"{f:g}" for f, other in zip(SCALES, band.scaled, strict=True) if other != band.band]
    return ", ".join(factors) or f"none of {SCALES[0]:g} to {SCALES[-1]:g}"


def _dispersion(scan: Data) -> str:
    return ", ".join(text(value, 1) for value in scan["dispersion"])


def _keys(view: View) -> str:
    items = "".join(
        f'<li>{key(view.colour(c["name"]))} {escape(c["name"])} <span class="tag">{c["kind"]}</span></li>'
        for c in view.conditions
    )
    return f'<ul class="keys">{items}</ul>'


def _flat(data: Data, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", str(value)


def _hover(cells: list[Data], maps: list[list[Data]]) -> str:
    """Counts of each picture and the order of experts of each model; only numbers, so `</` cannot occur."""
    data = {
        "counts": [[layer["counts"] for layer in cell["layers"]] for cell in cells],
        "order": [entries[0]["order"] if entries else [] for entries in maps],
    }
    return json.dumps(data, separators=(",", ":"))
