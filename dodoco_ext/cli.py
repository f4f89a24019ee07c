"""The command `dodoco`: few commands, one meaning of SOURCE, errors of one line.

Nothing heavy is imported before a command needs it: `dodoco show` must start in a blink on a machine
without torch.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from dodoco_ext import __version__, settings
from dodoco_ext.errors import DodocoError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 130, 141

# Commands that live elsewhere, with their line in `dodoco --help`, which must not import them.
LAZY = {
    "observe": (
        "dodoco_ext.observatory.command:observe",
        "Run a model over mock and real data, and compare its routing.",
    ),
    "report": (
        "dodoco_ext.observatory.report_command:report",
        "Write the page, figures and tables of a grid.",
    ),
    "show": (
        "dodoco_ext.show_command:show",
        "List recordings, or summarise one.",
    ),
    "run": (
        "dodoco_ext.run_command:run",
        "Run a command, outlive it, and archive what it recorded.",
    ),
    "top": (
        "dodoco_ext.views.top.command:top",
        "Watch expert balance live: all layers of a run or a recording.",
    ),
    "metrics": (
        "dodoco_ext.views.exporter.command:metrics",
        "Export recordings to Prometheus.",
    ),
    "template": (
        "dodoco_ext.views.template:template",
        "Print a dashboard, alert rules, or a deployment.",
    ),
}


class LazyGroup(click.Group):
    """A group that imports the commands of `LAZY` only when one is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in alphabetical order."""
        return sorted({*super().list_commands(ctx), *LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name, imported if need be."""
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = LAZY[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command), f"{LAZY[cmd_name][0]} is not a click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing any."""
        rows = []
        for name in self.list_commands(ctx):
            if name in LAZY:
                rows.append((name, LAZY[name][1]))
            else:
                rows.append((name, self.commands[name].get_short_help_str(limit=90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n"
    "  dodoco observe --preset demo      record five small MoE models, write a report\n"
    "  dodoco show                       list the recordings\n"
    "  dodoco show --latest --ep 8       summarise the latest, folded into 8 ranks\n"
    "  dodoco show my-run --fleet        all ranks of a run as one\n"
    "  dodoco top                        watch the latest run\n"
    "  dodoco doctor                     what works here, and what does not, and why\n"
    "\b\nExit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.",
)
@click.version_option(__version__, prog_name="dodoco")
@click.option("--debug", is_flag=True, help="Print the traceback of an unexpected error.")
def cli(debug: bool) -> None:
    """DODOCO: a flight recorder for mixture-of-experts routing."""


@cli.command(
    epilog="\b\nExamples:\n"
    "  dodoco doctor\n"
    "  dodoco doctor --json | jq '.checks[] | select(.status != \"ok\")'\n"
    "  DODOCO_DIR=/shared dodoco doctor      would recording there work?\n"
    "\b\nExit code: 0 if recording would work here, 1 if not."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what is installed and usable here, what is not, and why.

    Looks at the installation, the folder of the recordings (with a trial recording, removed again),
    the settings in effect and the recordings found. Changes nothing.
    """
    settings.start_lean()
    from dodoco_ext.views import doctor as view

    diagnosis = view.examine()
    if as_json:
        click.echo(view.diagnosis_json(diagnosis))
    else:
        view.print_diagnosis(diagnosis)
    ctx.exit(EXIT_OK if diagnosis.can_record else EXIT_ERROR)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; errors are on stderr, one line each."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    if "run" in options[:2] and options is given:
        options = given[: given.index("run") + 1]  # what follows may be the options of its command
    # Taken at any place: it is added to a command that has just failed.
    debug = settings.debug() or "--debug" in options
    given = [text for text in options if text != "--debug"] + given[len(options) :]
    try:
        code = cli.main(given, prog_name="dodoco", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "dodoco"
        return _fail(f"{error.format_message()} (see `{where} --help`)", EXIT_USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), EXIT_ERROR)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_explain(error, given), EXIT_ERROR)
    return code if isinstance(code, int) else EXIT_OK


def _explain(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, DodocoError):
        return str(error)
    if isinstance(error, ImportError):
        missing = (error.name or "").split(".")[0]
        if error.name in ("dodoco_ext._C", "_C") or "_C" in str(error):
            return (
                f"the C++ module is unusable ({error}): reinstall dodoco-ext; see `dodoco doctor`"
            )
        if isinstance(error, ModuleNotFoundError) and missing != "dodoco_ext":
            from dodoco_ext.views.packages import remedy

            return f"{missing} is not installed: {remedy(missing)}; see `dodoco doctor`"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    again = shlex.join(["dodoco", *arguments, "--debug"])
    return (
        f"unexpected {type(error).__name__}: {error}; run `{again}` for a traceback and report it"
    )


def _fail(message: str, code: int) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    click.echo(f"dodoco: error: {line}", err=True)
    return code


def main() -> NoReturn:
    """Entry point of the command `dodoco`."""
    sys.exit(run())
