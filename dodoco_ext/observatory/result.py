"""What an observation found, as plain data that goes to JSON and comes back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dodoco_ext.observatory.conditions import Kind
from dodoco_ext.observatory.whole import write_whole

Interval = tuple[float, float]


@dataclass(frozen=True)
class LayerResult:
    """One layer under one condition. Per-pass values are averaged over passes, all passes equally.

    Attributes:
        name: Qualified name of the router.
        num_experts, top_k: E and k.
        passes, tokens, assignments: What the recording's board counted in the window.
        counts: Assignments per expert over the window [E].
        gini: Gini of one pass, mean over passes.
        null_gini: Its expectation under uniform routing of the same tokens.
        null_gini_band: 95 % of single uniformly routed passes.
        corrected_gini: Gini that infinitely many tokens a pass would show (`nulls.corrected_gini`).
        window_gini: Gini of `counts`.
        max_over_mean: Largest over mean count of one pass, mean over passes.
        null_max_over_mean: Its expectation under uniform routing.
        null_max_over_mean_band: 95 % of single uniformly routed passes.
        unused_experts: Experts without an assignment in the whole window.
        unused_experts_per_pass: The same of one pass, mean over passes.
    """

    name: str
    num_experts: int
    top_k: int
    passes: int
    tokens: int
    assignments: int
    counts: list[int]
    gini: float
    null_gini: float
    null_gini_band: Interval
    corrected_gini: float
    window_gini: float
    max_over_mean: float
    null_max_over_mean: float
    null_max_over_mean_band: Interval
    unused_experts: int
    unused_experts_per_pass: float


@dataclass(frozen=True)
class Overall:
    """A condition's layers together: means over layers, all layers equally.

    Attributes:
        gini, null_gini, corrected_gini, window_gini, max_over_mean, null_max_over_mean: Means of
            the layers' values of the same name.
        corrected_gini_interval: 95 % interval of `corrected_gini`, passes resampled.
        unused_experts: Mean number of experts a layer left unused in the window.
    """

    gini: float
    null_gini: float
    corrected_gini: float
    corrected_gini_interval: Interval
    window_gini: float
    max_over_mean: float
    null_max_over_mean: float
    unused_experts: float


@dataclass(frozen=True)
class ConditionResult:
    """One condition: what was fed, and how it was routed.

    Attributes:
        name, kind, source, description: As in `conditions.Condition`.
        sha256: Digest of the ids that were fed.
        num_sequences, sequence_length, num_tokens: How much was fed.
        loss: Mean next-token cross-entropy, nats; nan where the model gives no logits.
        layers: One entry a layer, in execution order.
        overall: All layers together.
        pass_gini: Gini of each pass and layer [passes][layers].
        pass_tokens: Tokens of each pass and layer [passes][layers].
    """

    name: str
    kind: Kind
    source: str
    description: str
    sha256: str
    num_sequences: int
    sequence_length: int
    num_tokens: int
    loss: float
    layers: list[LayerResult]
    overall: Overall
    pass_gini: list[list[float]]
    pass_tokens: list[list[int]]


@dataclass(frozen=True)
class Ratio:
    """One condition over a real one.

    Attributes:
        numerator, denominator: Names of the two conditions.
        gini: Ratio of the overall Gini as measured, pass by pass.
        gini_interval: Its 95 % interval, passes of both resampled independently.
        corrected: Ratio of the overall corrected Gini; nan where the denominator is 0.
        corrected_interval: Its 95 % interval.
        layers_above: Layers in which the numerator's corrected Gini is the larger.
    """

    numerator: str
    denominator: str
    gini: float
    gini_interval: Interval
    corrected: float
    corrected_interval: Interval
    layers_above: int


@dataclass(frozen=True)
class ModelFacts:
    """The observed model.

    Attributes:
        name: As given, without folders.
        architecture: Class name.
        num_parameters: All weights.
        vocab_size: Rows of the embedding.
        training: The model's card, or None.
    """

    name: str
    architecture: str
    num_parameters: int
    vocab_size: int
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """A whole observation.

    Attributes:
        model: What was observed.
        seed, batch_size, num_batches: How.
        conditions: In the order in which they ran.
        ratios: Every mock or control over every real condition.
        uncovered: Routing parts of the model that were not observed, with the reason.
        texts: Digest of each built-in or packaged text that took part, by name.
        provenance: Versions, commit, machine; no host name, no path.
        seconds: Wall time of the observation, training apart.
        bos: Every sequence began with the token for that.
        padding: Padded positions at the end of every sequence.
        first_position: The first position of every sequence is among what was counted.
    """

    model: ModelFacts
    seed: int
    batch_size: int
    num_batches: int
    conditions: list[ConditionResult]
    ratios: list[Ratio]
    uncovered: list[tuple[str, str]]
    texts: dict[str, str]
    provenance: dict[str, str]
    seconds: float
    bos: bool = False
    padding: int = 0
    first_position: bool = True

    def of_kind(self, *kinds: Kind) -> list[ConditionResult]:
        """The conditions of these kinds, in order."""
        return [condition for condition in self.conditions if condition.kind in kinds]

    def condition(self, name: str) -> ConditionResult:
        """The condition of that name."""
        return next(condition for condition in self.conditions if condition.name == name)

    def ratio(self, numerator: str, denominator: str) -> Ratio | None:
        """The ratio of these two conditions, if it was computed."""
        pair = (numerator, denominator)
        return next((r for r in self.ratios if (r.numerator, r.denominator) == pair), None)

    def to_json(self) -> str:
        """Strict JSON; nan and infinity become null."""
        return json.dumps(plain(self), indent=1, allow_nan=False)

    def write_json(self, path: Path) -> None:
        """Writes `to_json()` to a file, whole or not at all."""
        with write_whole(path) as partial:
            partial.write_text(self.to_json() + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """A value of dataclasses, lists, dicts and numbers as JSON has them; nan and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
