r"""The grid's tables for LaTeX: one `tabular` a file, to be read in with \input; needs booktabs."""

from __future__ import annotations

from pathlib import Path

from dodoco_ext.observatory.page.tables import Table, tables
from dodoco_ext.observatory.page.view import View
from dodoco_ext.observatory.whole import write_whole

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "×": r"$\times$",
}


def latex(table: Table, digest: str) -> str:
    """A table as a `tabular` with rules of booktabs; its first line says where the numbers come from."""
    columns = "l" * table.texts + "r" * (len(table.heads) - table.texts)
    lines = [
        " & ".join(escape(cell) for cell in row) + r" \\" for row in [table.heads, *table.rows]
    ]
    return "\n".join(
        [
            f"% {table.title}; numbers {digest}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Text that TeX prints as it is."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def write_tables(view: View, folder: Path) -> list[Path]:
    """Writes every table as `NAME.tex`.

    Args:
        view: The grid.
        folder: Created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables(view):
        path = folder / f"{table.name}.tex"
        with write_whole(path) as partial:
            partial.write_text(latex(table, view.digest), encoding="utf-8")
        paths.append(path)
    return paths
