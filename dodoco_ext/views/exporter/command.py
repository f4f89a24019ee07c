"""`dodoco metrics`: the exporter's command line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import click

from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.views.exporter.table import OPTIONS


@click.command(
    epilog="\b\nExamples:\n"
    "  dodoco metrics                              serve all recordings of this user\n"
    "  dodoco metrics /dodoco --listen 0.0.0.0:9400   a sidecar: another folder, every interface\n"
    "  dodoco metrics --once                       print the metrics and end\n"
    "  dodoco metrics --textfile /var/lib/node_exporter\n"
    "  dodoco template grafana > dashboard.json    what to look at them with\n"
    "\b\nWhat each metric means and costs: docs/prometheus.md."
)
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option(
    "--listen",
    default="127.0.0.1:9400",
    show_default=True,
    metavar="HOST:PORT",
    help="Address to serve /metrics and /healthz on.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Seconds of the window of the window gauges.",
)
@click.option(
    "--keep",
    "keep_s",
    type=click.FloatRange(min=0),
    default=900.0,
    show_default=True,
    metavar="S",
    help="Seconds for which a recording that ended is exposed, as down.",
)
@click.option("--per-expert", is_flag=True, help="A series for every layer and expert.")
@click.option("--per-layer-alltoall", is_flag=True, help="AlltoAll times and bytes layer by layer.")
@click.option("--matrix", is_flag=True, help="A series for every source and destination.")
@click.option(
    "--no-wait",
    is_flag=True,
    help="Do not read single transfers: no waiting times, and the exporter needs less CPU time.",
)
@click.option(
    "--once", is_flag=True, help="Print the metrics once; there are no window gauges then."
)
@click.option(
    "--textfile",
    metavar="DIR",
    help="Write dodoco.prom for node_exporter into DIR, every --interval, and serve nothing.",
)
@click.option(
    "--interval", "interval_s", type=click.FloatRange(min=1), default=15.0, show_default=True,
    metavar="S", help="Seconds from one --textfile to the next.",
)  # fmt: skip
def metrics(
    folders: tuple[str, ...],
    listen: str,
    window_s: float,
    keep_s: float,
    per_expert: bool,
    per_layer_alltoall: bool,
    matrix: bool,
    no_wait: bool,
    once: bool,
    textfile: str | None,
    interval_s: float,
) -> None:
    """Export recordings to Prometheus.

    Serves the metrics of every recording in the FOLDERs (those that `dodoco show` lists by default), of
    whatever process, as they come and go. Reads only.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that would only wait
    from dodoco_ext.views.exporter.collect import registry_of
    from dodoco_ext.views.exporter.render import render
    from dodoco_ext.views.exporter.server import Server, address_of, write_textfile
    from dodoco_ext.views.exporter.state import State

    logging.basicConfig(format="dodoco: %(message)s", level=logging.INFO)
    for folder in folders:
        if Path(folder).exists() and not Path(folder).is_dir():
            raise InputError(f"{folder} is no folder: give the folder that holds the recordings")
    given = dict(zip(OPTIONS, (per_expert, per_layer_alltoall, matrix), strict=True))
    options = [name for name, wanted in given.items() if wanted]
    state = State(
        [Path(folder) for folder in folders],
        window_s=window_s,
        keep_s=keep_s,
        waits=not no_wait,
    )
    registry = registry_of(state, options)
    if once:
        if textfile is not None:
            write_textfile(registry, Path(textfile))
        else:
            sys.stdout.write(render(registry).decode())
        if problem := state.problem():
            raise DodocoError(problem)
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    address = address_of(listen)
    state.update()
    if textfile is not None:
        write_textfile(registry, Path(textfile))
        state.start()
        while not stop.wait(interval_s):
            write_textfile(registry, Path(textfile))
    else:
        server = Server(address, registry, state)
        state.start()
        click.echo(f"dodoco: {server.url}", err=True)
        stop.wait()
        server.close()
    state.stop()
