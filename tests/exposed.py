"""What an exporter exposes, as numbers by series."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.render import render
from dodoco_ext.views.exporter.state import State


class Clock:
    """Unix time that passes when it is told to, from the middle of a window on."""

    def __init__(self) -> None:
        minute = 60_000_000_000
        self.now_ns = time.time_ns() // minute * minute + minute // 2

    def __call__(self) -> int:
        return self.now_ns

    def pass_by(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


Series = tuple[tuple[str, str], ...]


class Exposed(dict[str, dict[Series, float]]):
    """The samples of one scrape: by name, then by labels."""

    def of(self, name: str, **labels: Any) -> dict[Series, float]:
        """Samples of a metric that have these labels, by the labels that are left."""
        wanted = {(key, str(value)) for key, value in labels.items()}
        return {
            tuple(pair for pair in series if pair not in wanted): value
            for series, value in self.get("dodoco_" + name, {}).items()
            if wanted <= set(series)
        }

    def by(self, label: str, name: str, **labels: Any) -> dict[str, float]:
        """Samples of a metric by the value of one label."""
        return {dict(series)[label]: value for series, value in self.of(name, **labels).items()}

    def one(self, name: str, **labels: Any) -> float:
        """The only sample with these labels."""
        (value,) = self.of(name, **labels).values()
        return value

    @property
    def num_series(self) -> int:
        return sum(map(len, self.values()))


def parsed(text: str) -> Exposed:
    found = Exposed()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = tuple(sorted(sample.labels.items()))
            name = found.setdefault(sample.name, {})
            assert series not in name, f"{sample.name} {series} twice"
            name[series] = sample.value
    return found


def scraped(state: State, *options: str) -> Exposed:
    """One scrape."""
    return parsed(render(registry_of(state, options)).decode())
