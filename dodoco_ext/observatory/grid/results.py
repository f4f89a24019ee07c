"""What a grid found, as plain data: `grid.json` of a results folder.

Figures are of one pass (a batch of `batch_size` sequences), averaged over passes, then over layers
with equal weight. Intervals are of 95 %.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.ep_results import EpScan
from dodoco_ext.observatory.result import Interval, plain

SCHEMA = "dodoco.grid/1"


@dataclass(frozen=True)
class Figures:
    """Imbalance over experts, or over EP ranks.

    Attributes:
        gini, gini_interval: Gini, passes of whole sequences resampled.
        null_gini, null_gini_band: Its expectation under uniform routing, and 95 % of single passes.
        corrected_gini, corrected_gini_interval: Without what chance adds (`nulls.corrected_gini`, given
            the loads of all passes).
        max_over_mean, max_over_mean_interval: Largest over mean.
        null_max_over_mean, null_max_over_mean_band: As of Gini.
        window_gini: Gini of the counts of all passes together.
    """

    gini: float
    gini_interval: Interval
    null_gini: float
    null_gini_band: Interval
    corrected_gini: float
    corrected_gini_interval: Interval
    max_over_mean: float
    max_over_mean_interval: Interval
    null_max_over_mean: float
    null_max_over_mean_band: Interval
    window_gini: float


@dataclass(frozen=True)
class Draws:
    """How far independent draws (seeds) of the same condition differ.

    Attributes:
        corrected_gini: Of each draw alone.
        interval: Of their mean by Student's t over draws.
        seed_sd: Standard deviation over draws.
        expected_sd: What it would be if draws differed by their sequences alone.
        p_value: Probability of so large a `seed_sd` then (chi-square).
    """

    corrected_gini: list[float]
    interval: Interval
    seed_sd: float
    expected_sd: float
    p_value: float


@dataclass(frozen=True)
class Layer:
    """One layer of a cell.

    Attributes:
        name: Qualified name of the router.
        num_experts, top_k: E and k.
        counts: Assignments an expert, all draws [E].
        unused_experts: Experts without any.
        experts: Imbalance over experts.
        ranks: Over EP ranks that hold equal contiguous runs of experts; None where E cannot be split.
        pass_gini: Gini over experts of each pass, draw by draw.
        pass_tokens: Tokens of a pass.
        noise: What chance adds to the mean of squared `pass_gini` (`nulls.gini_noise`).
    """

    name: str
    num_experts: int
    top_k: int
    counts: list[int]
    unused_experts: int
    experts: Figures
    ranks: Figures | None
    pass_gini: list[float]
    pass_tokens: int
    noise: float


@dataclass(frozen=True)
class GridCell:
    """One model under one condition.

    Attributes:
        model, condition, kind, source, description: What was fed to what.
        file, sha256: The cell's archive, and the digest of its numbers.
        num_sequences, sequence_length, num_tokens: How much was fed, all draws.
        loss: Mean cost of a token, nats.
        experts, ranks, draws: All layers together.
        layers: One a layer, in execution order.
        ep_scan: Imbalance over ranks against their number (`ep_scan.EpScan`).
    """

    model: str
    condition: str
    kind: str
    source: str
    description: str
    file: str
    sha256: str
    num_sequences: int
    sequence_length: int
    num_tokens: int
    loss: float
    experts: Figures
    ranks: Figures | None
    draws: Draws
    layers: list[Layer]
    ep_scan: EpScan | None = None


@dataclass(frozen=True)
class GridRatio:
    """A mock or control over a real condition, per expert; nan where the denominator is 0."""

    model: str
    numerator: str
    denominator: str
    numerator_kind: str
    gini: float
    gini_interval: Interval
    corrected: float
    corrected_interval: Interval
    layers_above: int


@dataclass(frozen=True)
class Step:
    """A part of the gap between mock-uniform and a real text.

    Attributes:
        start, end: Conditions; corrected Gini of `start` minus that of `end` is the step.
        what: What the two differ in.
        difference, difference_interval: The step.
        share, share_interval: Of the whole gap; nan where the gap cannot be told from 0.
    """

    start: str
    end: str
    what: str
    difference: float
    difference_interval: Interval
    share: float
    share_interval: Interval


@dataclass(frozen=True)
class Gap:
    """From mock-uniform to a real text: corrected Gini, and what explains the difference.

    Attributes:
        model, mock, real: Which.
        difference, difference_interval: Corrected Gini of the mock minus that of the text.
        controls: Mock minus control, for each control: what of the gap a control already has.
        steps: From mock to text by way of the controls made of it, in order; they add up to the gap.
    """

    model: str
    mock: str
    real: str
    difference: float
    difference_interval: Interval
    controls: list[Step]
    steps: list[Step]


@dataclass(frozen=True)
class Slope:
    """Change of Gini with each doubling of the batch, by least squares on log2(batch).

    Attributes:
        value, interval: The slope; of corrected Gini, less that of chance.
        chance: Slope of cells of the same loads whose tokens are independent, by the same computation.
        verdict: `rises`, `falls` or `none`.
    """

    value: float
    interval: Interval
    chance: float
    verdict: str


@dataclass(frozen=True)
class Curve:
    """Gini against batch size, mean over layers; lists run over `BatchScan.batch_sizes`.

    Attributes:
        tokens: Tokens in a histogram.
        gini, gini_interval, null_gini, null_gini_band: As in `Figures`.
        corrected_gini, corrected_gini_interval: Without what chance adds. No threshold, and the sign is
            kept: negative where passes are more even than chance alone would make them. So what is 0
            scatters about 0 at every size.
        raw_slope, corrected_slope: Of `gini` and of `corrected_gini`.
    """

    tokens: list[int]
    gini: list[float]
    gini_interval: list[Interval]
    null_gini: list[float]
    null_gini_band: list[Interval]
    corrected_gini: list[float]
    corrected_gini_interval: list[Interval]
    raw_slope: Slope
    corrected_slope: Slope


@dataclass(frozen=True)
class BatchScan:
    """A cell at growing batches of the very same sequences.

    Attributes:
        model, condition, kind: Which cell.
        batch_sizes: Sequences a pass.
        growing: Whole passes: more tokens in larger batches.
        equal: As many tokens from each pass as a batch of one has, drawn from all of its sequences.
        verdict: `survives` (the corrected Gini of whole passes has a trend), `vanishes` (only the raw one
            has) or `none`.
        dispersion: Of each layer, the variance of experts' counts from sequence to sequence over that of
            tokens that are routed independently; 1 where the tokens of a sequence do not resemble each other.
        dispersion_interval: Of each layer.
        layer_slope: Of each layer's corrected Gini, whole passes.
    """

    model: str
    condition: str
    kind: str
    batch_sizes: list[int]
    growing: Curve
    equal: Curve
    verdict: str
    dispersion: list[float]
    dispersion_interval: list[Interval]
    layer_slope: list[Slope]


@dataclass(frozen=True)
class GridModel:
    """One observed model."""

    name: str
    architecture: str
    num_parameters: int
    vocab_size: int
    num_layers: int
    num_experts: int
    top_k: list[int]
    uncovered: list[str]


@dataclass(frozen=True)
class GridCondition:
    """One condition, the same for every model but for its tokenizer."""

    name: str
    kind: str
    source: str
    description: str


@dataclass(frozen=True)
class Numbers:
    """Everything that follows from models, data, parameters and seed alone.

    Attributes:
        parameters: What determines the grid.
        models, conditions, cells, ratios, gaps, batch_scans: What was found; cells model by model.
        findings: What all of it says, computed.
    """

    parameters: dict[str, Any]
    models: list[GridModel]
    conditions: list[GridCondition]
    cells: list[GridCell]
    ratios: list[GridRatio]
    gaps: list[Gap]
    batch_scans: list[BatchScan]
    findings: list[str] = field(default_factory=list)

    def cell(self, model: str, condition: str) -> GridCell:
        """One cell."""
        return next(c for c in self.cells if (c.model, c.condition) == (model, condition))

    def scan(self, model: str, condition: str) -> BatchScan:
        """The batch scan of one cell."""
        return next(s for s in self.batch_scans if (s.model, s.condition) == (model, condition))


def to_json(numbers: Numbers, provenance: dict[str, Any]) -> str:
    """`grid.json`: strict JSON, nan and infinity as null.

    `numbers_sha256` is the digest of `numbers` as compact JSON with sorted keys: equal for equal
    numbers, whatever the provenance.
    """
    found = plain(numbers)
    document = {
        "schema": SCHEMA,
        "numbers_sha256": digest_of(found),
        "provenance": provenance,
        "numbers": found,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def digest_of(numbers: Any) -> str:
    """Digest of plain numbers."""
    compact = json.dumps(numbers, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(compact.encode()).hexdigest()


def read_json(folder: Path) -> dict[str, Any]:
    """`grid.json` of a results folder, as it is stored.

    Raises:
        InputError: There is none, it is of another schema, or its numbers were changed.
    """
    path = folder / "grid.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        schema, digest = document["schema"], document["numbers_sha256"]
        found = digest_of(document["numbers"])
    except FileNotFoundError:
        raise InputError(
            f"no grid.json in {folder}: make it with dodoco observe --preset grid --out {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}): run dodoco observe --preset grid again"
        ) from None
    if schema != SCHEMA:
        raise InputError(f"{path} is of schema {schema}, not {SCHEMA}: observe again")
    if found != digest:
        raise InputError(
            f"{path} does not match its digest: run dodoco observe --preset grid again"
        )
    return document
