"""`dodoco run`: what it takes on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from dodoco_ext import settings


@click.command(
    "run",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="\b\nExamples:\n"
    "  dodoco run --archive runs -- python train.py\n"
    "  dodoco run --archive runs -- torchrun --nproc-per-node 8 train.py\n"
    "  srun dodoco run --archive /project/runs -- python train.py\n"
    "  dodoco run -- vllm serve MODEL                record a vLLM server\n"
    "  dodoco run --archive runs                     archive what killed supervisors left\n"
    "\b\nExit code: that of COMMAND; 128 + n if signal n ended it; 126 or 127 if it cannot be started.",
)
@click.option("--archive", metavar="DIR", help="Copy its recordings to DIR when it ends or dies.")
@click.option("--run", "name", metavar="NAME", help="Name of the run, as DODOCO_RUN would set it.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait for processes that COMMAND left behind.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    archive: str | None,
    name: str | None,
    grace_s: float,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND, outlive it, and archive what it recorded.

    The processes that COMMAND starts share the name of one run, and vLLM servers among them are recorded
    (DODOCO=1), unless DODOCO=0 says otherwise. Signals are passed on to it. With
    --archive they record into a private folder (DODOCO_DIR if that is set), and when COMMAND ends, or is
    killed, all their recordings are copied to DIR, whole. What a killed supervisor leaves, the next
    one archives.
    """
    settings.start_lean()
    from dodoco_ext.supervisor import Supervisor, collect_abandoned

    if not command and archive is not None:
        collect_abandoned(settings.Settings.from_environment().directories())
        return
    target = None if archive is None else Path(archive)
    ctx.exit(Supervisor(command, archive=target, run=name, grace_s=grace_s)())
