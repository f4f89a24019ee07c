"""`dodoco show`: which of its views is meant, and what can be asked of it."""

from __future__ import annotations

from pathlib import Path

import click

from dodoco_ext import settings


@click.command(
    epilog="\b\nExamples:\n"
    "  dodoco show                                list the recordings of this user\n"
    "  dodoco show --latest                       summarise the latest one\n"
    "  dodoco show 4711                           the one that process 4711 writes or wrote\n"
    "  dodoco show my-run --ep 8                  run my-run, folded into 8 ranks\n"
    "  dodoco show my-run --fleet                 all ranks of run my-run as one\n"
    "  dodoco show archive --last 30s             how the latest run in a folder ended\n"
    "  dodoco show /shared/run.dodoco --experts   a file, with its busiest experts\n"
    "  dodoco show --list /shared                 list the recordings in a folder\n"
    "  dodoco show my-run --save before.json      keep its counters for later\n"
    "  dodoco show my-run --since before.json     what happened since then\n"
    "  dodoco show run-a --against run-b          two recordings side by side\n"
    "  dodoco show --prune                        remove recordings that ended, but two a rank\n"
    "  dodoco show --latest --json | jq '.layers[].whole_run.gini'"
)
@click.argument("source", required=False)
@click.option("--latest", is_flag=True, help="Summarise the latest recording.")
@click.option("--list", "listing", is_flag=True, help="List what SOURCE, a folder, holds.")
@click.option("--fleet", is_flag=True, help="All ranks of SOURCE's run (the latest run) as one.")
@click.option(
    "--last",
    "window",
    metavar="TIME",
    help="The end of SOURCE's run: who died, where it stood, and the last 30s (or 5m, 1h).",
)
@click.option(
    "--ep",
    "num_ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Balance of N expert-parallel ranks, experts placed in equal contiguous runs.",
)
@click.option("--experts", is_flag=True, help="Busiest and quietest experts; all counts in JSON.")
@click.option("--save", metavar="FILE", help="Also save the counters, for --since and --against.")
@click.option("--since", metavar="SNAP", help="Only what happened after a snapshot of --save.")
@click.option("--against", metavar="B", help="Compare with B, a SOURCE or a snapshot of --save.")
@click.option(
    "--prune", is_flag=True, help="Remove ended recordings, but the last two of each rank."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, exact and with stable keys.")
def show(
    source: str | None,
    latest: bool,
    listing: bool,
    fleet: bool,
    window: str | None,
    num_ranks: int | None,
    experts: bool,
    save: str | None,
    since: str | None,
    against: str | None,
    prune: bool,
    as_json: bool,
) -> None:
    """List recordings, or summarise one.

    Without SOURCE: the list. With SOURCE (a recording's file or name, a folder, a run, a PID): a
    summary of the recording it means. A folder or a run means all ranks of the (latest) run there.
    """
    one = (
        latest or fleet or window is not None or (source is not None and not listing and not prune)
    )
    given = {
        "--ep": num_ranks is not None,
        "--experts": experts,
        "--save": save is not None,
        "--since": since is not None,
        "--against": against is not None,
        "--fleet": fleet,
        "--last": window is not None,
        "--latest": latest,
        "--list": listing,
        "--prune": prune,
    }
    if latest and source is not None:
        raise click.UsageError("give SOURCE or --latest, not both")
    for name in ("--prune", "--list", "--fleet", "--last", "--against"):
        if given[name] and (clash := _excluded_by(name, given)):
            raise click.UsageError(f"give {name} or {clash}, not both")
    wanting = [
        name for name in ("--ep", "--experts", "--save", "--since", "--against") if given[name]
    ]
    if not one and wanting:
        raise click.UsageError(f"{wanting[0]} needs a recording: give SOURCE or --latest")
    if (listing or prune) and source is not None and not Path(source).is_dir():
        raise click.UsageError(
            f"--{'list' if listing else 'prune'} takes a folder; {source} is none"
        )
    settings.start_lean()
    if prune:
        _prune(source, as_json=as_json)
    elif window is not None:
        _show_ending(source, window, as_json=as_json)
    elif fleet or (source is not None and _means_many(source, given)):
        _show_fleet(source, num_ranks=num_ranks, experts=experts, as_json=as_json)
    elif against is not None:
        _show_comparison(source, against, as_json=as_json)
    elif one:
        _show_one(source, since, save, num_ranks=num_ranks, experts=experts, as_json=as_json)
    else:
        _show_list(source, as_json=as_json)


_COMPATIBLE = {
    "--prune": {"--prune"},
    "--list": {"--list"},
    "--fleet": {"--fleet", "--last", "--latest", "--ep", "--experts"},
    "--last": {"--last", "--fleet", "--latest"},
    "--against": {"--against", "--latest"},
}


def _excluded_by(name: str, given: dict[str, bool]) -> str | None:
    """An option that was given and makes no sense together with another."""
    return next(
        (other for other, is_given in given.items() if is_given and other not in _COMPATIBLE[name]),
        None,
    )


def _show_list(source: str | None, *, as_json: bool) -> None:
    from dodoco_ext.sources import find
    from dodoco_ext.views import listing

    own = settings.Settings.from_environment()
    folders = (Path(source),) if source else own.reading_directories()
    recordings = [listing.describe(found) for found in find(folders)]
    if as_json:
        click.echo(listing.to_json(recordings, folders))
    else:
        listing.print_listing(recordings, folders)


def _show_one(
    source: str | None,
    since: str | None,
    save: str | None,
    *,
    num_ranks: int | None,
    experts: bool,
    as_json: bool,
) -> None:
    from dodoco_ext.snapshots import load_snapshot, save_snapshot
    from dodoco_ext.sources import open_recording
    from dodoco_ext.views.show import print_summary, summary_json
    from dodoco_ext.views.summary import summarise

    earlier = None if since is None else load_snapshot(since)
    reader = open_recording(source)
    summary = summarise(reader, num_ranks=num_ranks, since=earlier, since_name=since or "")
    saved = None if save is None else Path(save)
    if saved is not None:
        save_snapshot(summary.snapshot, saved)
    if as_json:
        click.echo(summary_json(summary, experts=experts, saved=saved))
    else:
        print_summary(summary, experts=experts, saved=saved)


def _show_fleet(source: str | None, *, num_ranks: int | None, experts: bool, as_json: bool) -> None:
    from dodoco_ext.fleet import Fleet
    from dodoco_ext.views.fleet import fleet_json, print_fleet, summarise_fleet

    summary = summarise_fleet(Fleet.open(source), num_ranks=num_ranks)
    if as_json:
        click.echo(fleet_json(summary, experts=experts))
    else:
        print_fleet(summary, experts=experts)


def _means_many(source: str, given: dict[str, bool]) -> bool:
    """Whether SOURCE is a folder or a run, of several ranks, and nothing asks for one of them."""
    from dodoco_ext.sources import means_one, open_recording

    if any(given[name] for name in ("--list", "--prune", "--save", "--since", "--against")):
        return False
    return not means_one(source) and int(open_recording(source).header["world_size"]) > 1


def _show_ending(source: str | None, window: str, *, as_json: bool) -> None:
    from dodoco_ext.fleet import Fleet
    from dodoco_ext.traffic.ending import ending_of
    from dodoco_ext.views.ending import ending_json, print_ending, seconds_of

    seconds = seconds_of(window)
    fleet = Fleet.open(source)
    ending = ending_of(fleet, seconds)
    if as_json:
        click.echo(ending_json(fleet, ending))
    else:
        print_ending(fleet, ending)


def _show_comparison(source: str | None, against: str, *, as_json: bool) -> None:
    from dodoco_ext.views.compare import compare, comparison_json, print_comparison

    comparison = compare(source, against)
    if as_json:
        click.echo(comparison_json(comparison))
    else:
        print_comparison(comparison)


def _prune(source: str | None, *, as_json: bool) -> None:
    from dodoco_ext.pruning import prune
    from dodoco_ext.views import listing

    folders = (Path(source),) if source else settings.Settings.from_environment().directories()
    removed = [path for folder in folders for path in prune(folder)]
    if as_json:
        click.echo(listing.pruned_json(removed, folders))
    else:
        listing.print_pruned(removed, folders)
