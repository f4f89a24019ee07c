"""The command `dodoco top`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from dodoco_ext.errors import DodocoError, InputError

if TYPE_CHECKING:
    from dodoco_ext.views.top.session import Session


@click.command(
    epilog="\b\nExamples:\n"
    "  dodoco top                       the latest run, over its restarts; s chooses another\n"
    "  dodoco top my-run                all ranks of run my-run, summed\n"
    "  dodoco top 4711                  what process 4711 records\n"
    "  dodoco top my-run --ep 8         eight ranks share the experts\n"
    "  dodoco top --once | head -1      what imbalance costs now, in one line"
)
@click.argument("source", required=False)
@click.option("--once", is_flag=True, help="Print one picture as text, and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds from one look to the next.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(min=1, max=86400),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How far back figures and lines reach.",
)
@click.option(
    "--ep",
    "num_ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks that share the experts of a layer; as recorded or assumed by default.",
)
def top(
    source: str | None, once: bool, interval_s: float, window_s: float, num_ranks: int | None
) -> None:
    """Watch expert balance live: all layers of a run or a recording.

    SOURCE is a run, a recording's file or name, a folder or a PID; without it, the latest run. What is
    not there yet is waited for. Press ? for the keys.
    """
    # Before numpy is imported: reading needs no linear algebra, and its threads cost 0.08 s.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if window_s < interval_s:
        raise InputError(f"--window {window_s:g} is shorter than --interval {interval_s:g}")
    from dodoco_ext.views.top.session import Session

    session = Session(source, window_s=window_s, num_ranks=num_ranks)
    if once:
        _print(session, interval_s)
        return
    if not _on_a_terminal():
        raise DodocoError("top draws on a terminal, and here is none: use `dodoco top --once`")
    try:
        from dodoco_ext.views.top.app import TopApp
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise DodocoError(
            "textual is not installed: pip install 'dodoco-ext[top]' (`dodoco top --once` needs none)"
        ) from None
    TopApp(session, interval_s).run()


def _on_a_terminal() -> bool:
    """Whether there is one to draw on; Textual writes to stderr."""
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def _print(session: Session, interval_s: float) -> None:
    from dodoco_ext.views import tables
    from dodoco_ext.views.top.text import frame_lines, without_blocks

    frame = session.look()
    if session.is_live():
        time.sleep(interval_s)
        frame = session.look()
    console = tables.console()
    can_draw = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    for line in frame_lines(frame, console.width):
        text = line if can_draw else without_blocks(line)
        console.print(text, soft_wrap=True)
