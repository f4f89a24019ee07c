"""The grid as a table: `cells.parquet`, one row a cell and layer, for pandas, polars, DuckDB and R."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dodoco_ext.observatory.grid.results import Figures, GridCell, Numbers
from dodoco_ext.observatory.whole import write_whole

ALL_LAYERS = -1
"""Layer of the rows that hold a cell's figures over all layers."""


def rows(numbers: Numbers) -> Iterator[dict[str, Any]]:
    """Of each cell, one row of all layers together and one a layer."""
    for cell in numbers.cells:
        yield {
            **_cell(cell),
            "layer": ALL_LAYERS,
            "router": None,
            "num_experts": cell.layers[0].num_experts,
            "top_k": None,
            "unused_experts": None,
            "counts": None,
            **_figures("expert", cell.experts),
            **_figures("rank", cell.ranks),
        }
        for number, layer in enumerate(cell.layers):
            yield {
                **_cell(cell),
                "layer": number,
                "router": layer.name,
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                "unused_experts": layer.unused_experts,
                "counts": layer.counts,
                **_figures("expert", layer.experts),
                **_figures("rank", layer.ranks),
            }


def write(numbers: Numbers, provenance: str, folder: Path) -> list[Path]:
    """Writes `cells.parquet`, whole or not at all; nothing without pyarrow.

    Args:
        numbers: The grid.
        provenance: Kept in the file's metadata, under `dodoco.provenance`.
        folder: Where to.

    Returns:
        The file, if it was written.

    Raises:
        OSError: It cannot be written.
    """
    if find_spec("pyarrow") is None:
        return []
    import pyarrow
    from pyarrow import parquet

    found = pyarrow.Table.from_pylist(list(rows(numbers)))
    found = found.replace_schema_metadata({"dodoco.provenance": provenance})
    path = folder / "cells.parquet"
    with write_whole(path) as partial:
        parquet.write_table(found, partial)
    return [path]


def _cell(cell: GridCell) -> dict[str, Any]:
    names = ("model", "condition", "kind", "source", "num_sequences", "num_tokens", "loss")
    return {name: getattr(cell, name) for name in names}


def _figures(scope: str, figures: Figures | None) -> dict[str, Any]:
    """Every figure as a column; intervals as two."""
    found: dict[str, Any] = {}
    names = Figures.__dataclass_fields__
    values = dict.fromkeys(names) if figures is None else asdict(figures)
    for name, value in values.items():
        if name.endswith(("_interval", "_band")):
            low, high = value or (None, None)
            found[f"{scope}_{name}_low"], found[f"{scope}_{name}_high"] = low, high
        else:
            found[f"{scope}_{name}"] = value
    return found
