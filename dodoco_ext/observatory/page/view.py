"""What the page asks of a results folder: cells by name, scans, bands. Nothing is computed from raw counts."""

from __future__ import annotations

from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.bands import BandResult, Evidence, assign_bands
from dodoco_ext.observatory.ep_results import EpScan, from_plain
from dodoco_ext.observatory.grid.results import read_json
from dodoco_ext.observatory.published import MODELS, PublishedModel

Data = dict[str, Any]


def number(value: Any) -> float:
    """A stored number; nan where none could be told."""
    return nan if value is None else float(value)


def interval(value: Any) -> tuple[float, float]:
    """A stored interval."""
    low, high = value or (None, None)
    return number(low), number(high)


class View:
    """A grid as the page needs it.

    Args:
        document: `grid.json`.

    Raises:
        InputError: It holds no cell.
    """

    def __init__(self, document: Data) -> None:
        self.provenance: Data = document["provenance"]
        self.digest: str = document["numbers_sha256"]
        self.numbers: Data = document["numbers"]
        self.parameters: Data = self.numbers["parameters"]
        self.cells: list[Data] = self.numbers["cells"]
        if not self.cells:
            raise InputError("the grid holds no cell: observe at least one model and condition")
        self.conditions: list[Data] = self.numbers["conditions"]
        self.models: list[str] = [model["name"] for model in self.numbers["models"]]
        self._by_name = {(c["model"], c["condition"]): c for c in self.cells}

    @classmethod
    def of_folder(cls, folder: Path) -> View:
        """Reads a results folder.

        Raises:
            InputError: No grid is there, or it is damaged.
        """
        return cls(read_json(folder))

    def cell(self, model: str, condition: str) -> Data | None:
        """One cell, if it was observed."""
        return self._by_name.get((model, condition))

    def facts(self, model: str) -> Data:
        """What is known of a model."""
        found: Data = next(m for m in self.numbers["models"] if m["name"] == model)
        return found

    def names(self, *kinds: str) -> list[str]:
        """Conditions of these kinds, in order; all of them without one."""
        return [c["name"] for c in self.conditions if not kinds or c["kind"] in kinds]

    def of_kind(self, kind: str, model: str | None = None) -> list[Data]:
        """Cells of a kind, of one model or of all."""
        return [c for c in self.cells if c["kind"] == kind and model in (None, c["model"])]

    def colour(self, condition: str) -> int:
        """Place of a condition, which fixes its colour and its marker."""
        return self.names().index(condition)

    def ratios(self, model: str | None = None, kind: str | None = None) -> list[Data]:
        """Ratios over real texts, of one model or of all, of one kind of numerator or of all."""
        return [
            r
            for r in self.numbers["ratios"]
            if model in (None, r["model"]) and kind in (None, r["numerator_kind"])
        ]

    def gaps(self, model: str) -> list[Data]:
        """What explains mock against real, for each real text of a model."""
        return [g for g in self.numbers["gaps"] if g["model"] == model]

    def batch_scan(self, model: str, condition: str) -> Data | None:
        """A cell's batch scan, if there is one."""
        found = (
            s
            for s in self.numbers["batch_scans"]
            if (s["model"], s["condition"]) == (model, condition)
        )
        return next(found, None)

    @cached_property
    def ep_scans(self) -> dict[tuple[str, str], EpScan]:
        """EP scans by model and condition; cells without one are left out."""
        return {
            (cell["model"], cell["condition"]): from_plain(cell["ep_scan"])
            for cell in self.cells
            if cell.get("ep_scan")
        }

    def bands(self, corrected: bool = False) -> list[BandResult]:
        """Bands of the models that were observed on real text, by raw or by corrected Gini."""
        name = "corrected_gini" if corrected else "gini"
        evidence = {
            model: {
                c["condition"]: Evidence(
                    number(c["experts"][name]), interval(c["experts"][f"{name}_interval"])
                )
                for c in self.of_kind("real", model)
                if c["experts"][name] is not None
            }
            for model in self.models
        }
        return assign_bands(evidence, seed=self.parameters["seed"])

    def published(self, model: str) -> PublishedModel | None:
        """The published model that this one is, or whose sequence mixer it has."""
        return next((p for p in MODELS if model in (p.checkpoint, p.zoo)), None)
