"""The report stands alone: no outside reference, valid JSON, legible pictures."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest

from dodoco_ext.observatory import charts, report
from dodoco_ext.observatory.conditions import Kind
from dodoco_ext.observatory.findings import findings, limits
from dodoco_ext.observatory.result import Result
from observatory_cases import a_result

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

KINDS: dict[str, Kind] = {"uniform <mock>": "mock", "shuffled": "control", "prose": "real"}


@pytest.fixture(scope="module")
def result() -> Result:
    spread = [0.01 * (n % 3) for n in range(8)]
    gini = {name: [0.3 + s for s in spread] for name in KINDS}
    return a_result(gini, KINDS)


@pytest.fixture(scope="module")
def page(result: Result) -> str:
    return report.render_html(result)


def test_the_page_refers_to_nothing_outside(page: str) -> None:
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|@import|<link|<iframe|url\(", text)
    sources = re.findall(r"""(?:src|href|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_page_holds_every_sentence(result: Result, page: str) -> None:
    for sentence in (*findings(result), *limits(result)):
        assert _escaped(sentence) in page


def test_names_are_escaped(page: str) -> None:
    assert "uniform &lt;mock&gt;" in page
    assert "<mock>" not in page
    assert "planted <model>" not in page


def test_the_page_has_a_heat_map_of_each_condition_in_both_orders(
    result: Result, page: str
) -> None:
    assert page.count("data:image/png;base64,") == 2 * len(result.conditions)


def test_everything_is_written(result: Result, tmp_path: Path) -> None:
    paths = report.write_report(result, tmp_path / "new" / "folder")
    assert paths.png.read_bytes().startswith(b"\x89PNG")
    assert paths.html.read_text("utf-8").startswith("<!doctype html>")
    data = json.loads(paths.json.read_text("utf-8"))
    assert [c["name"] for c in data["conditions"]] == list(KINDS)
    assert data["conditions"][0]["layers"][0]["counts"] == result.conditions[0].layers[0].counts


def test_json_is_strict_where_a_number_is_missing() -> None:
    result = a_result({"prose": [0.3, 0.3]}, {"prose": "real"}, loss=math.nan)
    assert json.loads(result.to_json())["conditions"][0]["loss"] is None
    assert "–" in report.render_html(result)


def test_a_heat_map_image_is_a_png_of_one_pixel_an_expert() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    data = b64decode(charts.png_uri(image).partition(",")[2])
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    length = struct.unpack(">I", data[33:37])[0]
    rows = zlib.decompress(data[41 : 41 + length])
    assert rows == b"\0" + image[0].tobytes() + b"\0" + image[1].tobytes()


def test_colours_diverge_around_the_uniform_share() -> None:
    low, even, high, unused = charts.colours(np.array([0.125, 1.0, 8.0, 0.0])).astype(int)
    assert low[2] > low[0], "blue below"
    assert high[0] > high[2], "red above"
    assert np.ptp(even) < 10, "neutral at the uniform share"
    assert tuple(unused) == charts.UNUSED


def test_experts_are_ordered_by_their_load_under_the_first_real_text(result: Result) -> None:
    order = charts.expert_order(result)[0]
    counts = np.array(result.condition("prose").layers[0].counts)
    assert (np.diff(counts[order]) <= 0).all()


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))
