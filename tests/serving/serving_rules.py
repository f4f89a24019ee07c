"""What the alert rules of `dodoco template alerts` must do: series, and the alerts that they raise or do not."""

from __future__ import annotations

from dataclasses import dataclass, field

GROUP = '{model_name="tiny", ep_group="ep:0-1"}'
BOTH = {"model_name": "tiny", "ep_group": "ep:0-1"}


def of(metric: str, rank: int, **labels: str) -> str:
    """The name of a rank's series."""
    more = "".join(f', {key}="{value}"' for key, value in labels.items())
    return f'dodoco_{metric}{{model_name="tiny", ep_group="ep:0-1", rank="{rank}"{more}}}'


@dataclass(frozen=True)
class Case:
    """Series, as promtool writes them with a sample a minute, and what an alert makes of them.

    Attributes:
        alert: Its name.
        why: What the series are.
        series: Values by series.
        fires: Labels and the summary of each alert that has to fire; () for silence.
        minute: When to look.
    """

    alert: str
    why: str
    series: dict[str, str]
    fires: tuple[tuple[dict[str, str], str], ...] = ()
    minute: int = 35
    severity: str = field(default="warning")


def _load(first: int, second: int) -> dict[str, str]:
    return {
        of("received_assignments_total", rank, layer=layer): f"0+{each}x60"
        for rank, each in enumerate((first, second))
        for layer in ("a", "b")
    }


def _time(op: str, waits: tuple[int, int]) -> dict[str, str]:
    found = {}
    for rank, wait in enumerate(waits):
        found[of("alltoall_seconds_total", rank, op=op)] = "0+10x60"
        found[of("alltoall_wait_seconds_total", rank, op=op)] = f"0+{wait}x60"
    return found


def _up(*values: str) -> dict[str, str]:
    return {
        f"dodoco_ep_ranks{GROUP}": "2x60",
        **{of("recorder_up", rank): value for rank, value in enumerate(values)},
    }


def _passes(*values: str, up: str = "1x60") -> dict[str, str]:
    return {
        **{of("last_pass_timestamp_seconds", rank): v for rank, v in enumerate(values)},
        **{of("recorder_up", rank): up for rank in range(len(values))},
    }


NAMED = "tiny (ep:0-1)"
CASES = (
    Case(
        "DodocoRankImbalance",
        "rank 1 gets a quarter of what rank 0 gets",
        _load(40_000, 10_000),
        ((BOTH, f"{NAMED}: the busiest rank receives 1.60 times the mean"),),
    ),
    Case("DodocoRankImbalance", "balance", _load(40_000, 39_000)),
    Case("DodocoRankImbalance", "just within the threshold", _load(30_000, 10_000)),
    Case("DodocoRankImbalance", "uneven by chance: a handful of tokens", _load(40, 10)),
    Case("DodocoRankImbalance", "uneven, but not for long", _load(40_000, 10_000), minute=8),
    Case(
        "DodocoStragglerWait",
        "rank 0 waits half of the time, rank 1 a fifth",
        {**_time("dispatch", (5, 2)), **_time("combine", (5, 2))},
        ((BOTH, f"{NAMED}: 35% of AlltoAll time is spent waiting"),),
    ),
    Case("DodocoStragglerWait", "a tenth is usual", _time("dispatch", (1, 1))),
    Case(
        "DodocoMissingRank",
        "rank 1 was killed",
        _up("1x60", "1x10 0x50"),
        ((BOTH, f"{NAMED}: 1 ranks do not record"),),
        severity="critical",
    ),
    Case(
        "DodocoMissingRank",
        "rank 1 never came",
        _up("1x60"),
        ((BOTH, f"{NAMED}: 1 ranks do not record"),),
        severity="critical",
    ),
    Case("DodocoMissingRank", "all there", _up("1x60", "1x60")),
    Case("DodocoMissingRank", "stopped as a whole", _up("1x10 0x50", "1x10 0x50")),
    Case("DodocoMissingRank", "a restart of a minute", _up("1x60", "1x30 0x0 1x60"), minute=32),
    Case(
        "DodocoSilentRecorder",
        "rank 1 lives and counts nothing from minute 10 on",
        _passes("0+60x60", "0+60x10 600x50"),
        (({**BOTH, "rank": "1"}, f"{NAMED} rank 1: last pass 1500 s before the others"),),
    ),
    Case("DodocoSilentRecorder", "all at work", _passes("0+60x60", "10+60x60")),
    Case("DodocoSilentRecorder", "an idle server", _passes("0+60x10 600x50", "0+60x10 600x50")),
    Case(
        "DodocoSilentRecorder",
        "ranks that are down are another alert's",
        _passes("0+60x60", "0+60x10 600x50", up="0x60"),
    ),
    Case(
        "DodocoUncoveredLayers",
        "two parts of the model are not observed",
        {
            of("layers", 0, state="covered"): "59x60",
            of("layers", 0, state="uncovered"): "2x60",
        },
        (
            (
                {**BOTH, "rank": "0", "state": "uncovered"},
                f"{NAMED} rank 0: 2 parts of the model are not observed",
            ),
        ),
    ),
    Case(
        "DodocoUncoveredLayers",
        "all are",
        {of("layers", 0, state="covered"): "61x60", of("layers", 0, state="uncovered"): "0x60"},
    ),
)
