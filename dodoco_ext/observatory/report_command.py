"""`dodoco report`: a results folder as a page, as figures and as tables."""

from __future__ import annotations

from pathlib import Path

import click

FORMATS = ("html", "figures", "latex")  # page.write.FORMATS, which is not imported for --help


@click.command(
    epilog="\b\nExamples:\n"
    "  dodoco observe --preset grid --out results/grid   first observe\n"
    "  dodoco report results/grid                        then write the page, figures and tables beside it\n"
    "  dodoco report results/grid --only html --out .    the page alone, here"
)
@click.argument("results", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to; by default RESULTS itself.",
)
@click.option(
    "--only",
    type=click.Choice(FORMATS),
    multiple=True,
    help="Write only this: report.html, figures/*.png and *.svg, or tables/*.tex. May be repeated.",
)
def report(results: Path, out: Path | None, only: tuple[str, ...]) -> None:
    """Write the report of RESULTS, a folder of `dodoco observe --preset grid`.

    The page is one file that opens without a network.
    """
    from dodoco_ext.observatory.page.write import write_page

    for path in write_page(results, out, only or FORMATS):
        click.echo(str(path))
