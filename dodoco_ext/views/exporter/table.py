"""Every metric that `dodoco metrics` exposes: what registers them, docs/prometheus.md and tests derive from this."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "dodoco_"
GROUP = ("model_name", "ep_group")
RANK = (*GROUP, "rank")
LAYER = (*GROUP, "layer")

PASS_SIZES: tuple[tuple[str, int, int], ...] = (
    ("1-63", 0, 6),
    ("64-1023", 6, 10),
    ("1024+", 10, 20),
)
"""Classes of tokens a pass: name, and rows of the board's histograms (row c: from 2^c tokens)."""

BUCKETS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Bounds of `pass_max_over_mean`: some of `MAX_OVER_MEAN_BOUNDS`, so that no pass is put in two."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As exposed, `_total` of counters included; without `dodoco_`.
        kind: `counter`, `gauge`, `histogram` or `info`.
        unit: What one is.
        labels: Names of the labels, in order.
        help: The HELP line.
        option: The option of `dodoco metrics` that it needs; "" for none.
    """

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str
    option: str = ""

    @property
    def full_name(self) -> str:
        """The name as Prometheus stores it."""
        return PREFIX + self.name


METRICS = (
    Metric(
        "recorder_info", "info", "", (*RANK, "run", "pid", "host", "version"),
        "What the recording of a rank says about itself; always 1.",
    ),
    Metric(
        "recorder_up", "gauge", "", RANK,
        "1 while the process that records a rank lives, 0 after it ended or was killed.",
    ),
    Metric(
        "ep_ranks", "gauge", "ranks", GROUP,
        "Ranks that should record: those of the expert-parallel group, or the run's world size where none is named.",
    ),
    Metric(
        "recorder_faults_total", "counter", "faults", (*RANK, "reason"),
        "Telemetry faults by reason; other: the reason is not known to this version, or was not recorded.",
    ),
    Metric(
        "layers", "gauge", "layers", (*RANK, "state"),
        "Parts of the model that route: covered by a probe, or uncovered and missing from every other metric.",
    ),
    Metric(
        "last_pass_timestamp_seconds", "gauge", "seconds", RANK,
        "Unix time of the last pass that a rank counted; where no router is observed, of the last transfer.",
    ),
    Metric(
        "tokens_total", "counter", "tokens", (*RANK, "layer"),
        "Tokens that a rank routed at a layer, padding and dummy passes excluded.",
    ),
    Metric(
        "received_assignments_total", "counter", "assignments", (*RANK, "layer"),
        "(token, expert) pairs that a rank received to compute; absent where it cannot be known. Estimated where "
        "only counts by expert are known and experts have replicas: these share evenly.",
    ),
    Metric(
        "dropped_assignments_total", "counter", "assignments", (*RANK, "reason"),
        "(token, expert) pairs that a rank did not route, all layers: beyond capacity, or invalid ids.",
    ),
    Metric(
        "alltoall_seconds_total", "counter", "seconds", (*RANK, "op"),
        "Time of timed AlltoAlls from begin to end, all layers.",
    ),
    Metric(
        "alltoall_wait_seconds_total", "counter", "seconds", (*RANK, "op"),
        "Estimated time that a rank waited in AlltoAlls for the last rank, since the exporter watches the group.",
    ),
    Metric(
        "alltoall_bytes_total", "counter", "bytes", (*RANK, "op", "direction"),
        "Bytes of AlltoAlls, all layers, to and from the own rank included.",
    ),
    Metric(
        "placement_changes_total", "counter", "changes", RANK,
        "Changes of where physical experts lie, since the recording began.",
    ),
    Metric(
        "pass_max_over_mean", "histogram", "", (*LAYER, "pass_tokens"),
        "Busiest expert over the mean in single passes, all ranks, by tokens in the pass. No _sum: it is not recorded.",
    ),
    Metric(
        "window_gini", "gauge", "", LAYER,
        "Gini of the experts' assignments in the last whole window, all ranks.",
    ),
    Metric(
        "window_gini_corrected", "gauge", "", LAYER,
        "Gini of the window without what chance adds; 0 where it cannot be told from uniform routing.",
    ),
    Metric(
        "window_gini_floor", "gauge", "", LAYER,
        "Expected Gini of uniform routing of as many tokens.",
    ),
    Metric(
        "window_expert_max_over_mean", "gauge", "", LAYER,
        "Busiest expert over the mean in the last whole window, all ranks.",
    ),
    Metric(
        "window_unused_experts", "gauge", "experts", LAYER,
        "Experts without an assignment in the last whole window, all ranks.",
    ),
    Metric(
        "exporter_recordings", "gauge", "recordings", ("state",),
        "Recordings found, by state; shadowed: another one with the same labels is exposed instead.",
    ),
    Metric(
        "expert_assignments_total", "counter", "assignments", (*LAYER, "expert"),
        "Assignments of a logical expert, all ranks.", "--per-expert",
    ),
    Metric(
        "layer_alltoall_seconds_total", "counter", "seconds", (*RANK, "layer", "op"),
        "Time of timed AlltoAlls from begin to end.", "--per-layer-alltoall",
    ),
    Metric(
        "layer_alltoall_bytes_total", "counter", "bytes", (*RANK, "layer", "op", "direction"),
        "Bytes of AlltoAlls, to and from the own rank included.", "--per-layer-alltoall",
    ),
    Metric(
        "alltoall_rows_total", "counter", "rows", (*GROUP, "op", "source", "destination"),
        "Rows sent from rank to rank in forward AlltoAlls, all layers, as the source counted them.", "--matrix",
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
OPTIONS = tuple(dict.fromkeys(metric.option for metric in METRICS if metric.option))


def reference() -> str:
    """The table of docs/prometheus.md, in Markdown."""
    lines = ["| metric | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        text = metric.help.rstrip(".") + (f". With `{metric.option}`" if metric.option else "")
        lines.append(
            f"| `{metric.full_name}` | {metric.kind} | {metric.unit or '-'} | {labels} | {text} |"
        )
    return "\n".join(lines)
