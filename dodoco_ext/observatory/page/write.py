"""Writes everything that a grid can be read from: page, figures, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.page.figures import write_figures
from dodoco_ext.observatory.page.latex import write_tables
from dodoco_ext.observatory.page.render import render
from dodoco_ext.observatory.page.view import View
from dodoco_ext.observatory.whole import write_whole

FORMATS = ("html", "figures", "latex")


def write_page(results: Path, out: Path | None = None, only: Sequence[str] = FORMATS) -> list[Path]:
    """Writes `report.html`, `figures/*.png`, `figures/*.svg` and `tables/*.tex`, each whole or not at all.

    Args:
        results: Folder with `grid.json`.
        out: Folder to write to; created if missing. None: `results`.
        only: Which of `FORMATS`.

    Returns:
        The files, the page first.

    Raises:
        InputError: There is no grid, it is damaged, a package is missing, or the folder cannot be written to.
    """
    view = View.of_folder(results)
    folder = out or results
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "html" in only:
            paths.append(folder / "report.html")
            with write_whole(paths[0]) as partial:
                partial.write_text(render(view), encoding="utf-8")
        if "figures" in only:
            paths += write_figures(view, folder / "figures")
        if "latex" in only:
            paths += write_tables(view, folder / "tables")
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): give another --out"
        ) from None
    return paths
