"""A real Prometheus scrapes a real exporter, and every panel of the dashboard has something to show."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dodoco_ext as dodoco
from dodoco_ext.views.template import content
from served import Served, server, work
from serving_tools import Prometheus, needs_prometheus, prometheus
from test_exporter_server import exporter

pytestmark = needs_prometheus
DASHBOARD = json.loads(content("grafana"))
# What Grafana fills in before it asks.
VARIABLES = {"$__rate_interval": "10s", "$model": ".*", "$group": ".*"}


def queries() -> list[Any]:
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.append(pytest.param(expression, id=f"{panel['title']} {target['refId']}"))
    return found


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    """A server of two ranks that is at work until the tests are done."""
    folder = tmp_path_factory.mktemp("serving") / "recordings"
    ranks = server(2, layers=3, num_experts=16, top_k=2, folder=folder)
    stop = threading.Event()

    def go_on() -> None:
        seed = 0
        while not stop.wait(0.05):
            work(
                ranks, tokens=(4, 100, 1100)[seed % 3], seed=seed, skew=0.5, late=0, late_ns=50_000
            )
            seed += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    yield ranks
    stop.set()
    thread.join()


@pytest.fixture(scope="module")
def scraping(busy: list[Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    recordings = str(busy[0].path.parent)
    with (
        exporter(recordings, "--window", "2") as (_, address),
        prometheus(folder, address.removeprefix("http://"), content("alerts")) as found,
    ):
        yield found


def eventually(scraping: Prometheus, expression: str, timeout_s: float = 60) -> list[float]:
    end = time.monotonic() + timeout_s
    while True:
        values = scraping.values(expression)
        if values and all(map(math.isfinite, values)):
            return values
        assert time.monotonic() < end, f"{expression}: {values}"
        time.sleep(0.2)


@pytest.mark.parametrize("expression", queries())
def test_a_panel_has_data(expression: str, scraping: Prometheus) -> None:
    assert "$" not in expression
    eventually(scraping, expression)


def test_variables_of_the_dashboard_have_values(scraping: Prometheus) -> None:
    for variable in DASHBOARD["templating"]["list"][1:]:
        asked = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"])
        assert asked is not None
        metric, label = asked.groups()
        assert scraping.ask(f"label/{label}/values", **{"match[]": metric})


def test_prometheus_has_what_the_recordings_have(busy: list[Served], scraping: Prometheus) -> None:
    layer = busy[1].specs[2].name
    series = f'dodoco_tokens_total{{rank="1",layer="{layer}"}}'
    before = dodoco.Reader(busy[1].path).snapshot().layers[2].tokens
    end = time.monotonic() + 60
    while not before <= (eventually(scraping, series)[0]):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert scraping.values(series)[0] <= dodoco.Reader(busy[1].path).snapshot().layers[2].tokens


def test_no_sample_was_refused_and_no_rule_fails(scraping: Prometheus) -> None:
    eventually(scraping, "up")
    (target,) = scraping.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert eventually(scraping, "scrape_samples_scraped")[0] > 50
    rules = [rule for group in scraping.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 5
    end = time.monotonic() + 60
    while any(rule["health"] == "unknown" for rule in rules):
        assert time.monotonic() < end
        time.sleep(0.2)
        rules = [rule for group in scraping.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert scraping.values("ALERTS") == []


def test_every_metric_is_on_the_dashboard_or_asked_for() -> None:
    from dodoco_ext.views.exporter.table import METRICS

    shown = " ".join(t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"])
    for metric in METRICS:
        assert metric.option or metric.full_name in shown, metric.full_name


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["description"]
