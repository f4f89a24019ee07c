"""The finding in words: every sentence is chosen and filled by the numbers of a result."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import numpy as np

from dodoco_ext.observatory.result import ConditionResult, Interval, Ratio, Result

TINY_PARAMETERS = 100_000_000
"""Below this many weights a model is called tiny."""

SMALL_CORRECTION = 0.02
"""A Gini that the correction moves by less is said to need none."""


def findings(result: Result) -> list[str]:
    """Sentences on what the result shows, the main one first."""
    return [
        *_uniform_over_real(result),
        *_all_ratios(result),
        *_ladder(result),
        *_real_texts(result),
        *_same_experts(result),
        *_busiest(result),
        *_unused(result),
        *_floor(result),
        *_window(result),
        *_learned(result),
    ]


def limits(result: Result) -> list[str]:
    """Sentences on what does not follow from the result."""
    model = result.model
    layers = len(result.conditions[0].layers)
    size = "tiny" if model.num_parameters < TINY_PARAMETERS else "one model among many"
    shape = f"{model.num_parameters:,} parameters in {layers} MoE {_plural('layer', layers)}"
    sentences = []
    if model.training is not None:
        training = model.training
        sentences.append(
            f"The model is {size}: {shape}, trained for {training['num_steps']:,} steps on "
            f"{training['num_tokens']:,} tokens. That larger models, longer training or other ways of "
            "balancing give the same picture does not follow."
        )
    else:
        sentences.append(
            f"The model is {size}: {shape}. That other models give the same picture does not follow."
        )
    first = result.conditions[0]
    sentences.append(
        f"All ratios hold for passes of {result.batch_size} x {first.sequence_length} tokens; at other "
        "sizes they were not measured."
    )
    sentences.append(
        f"One process held all experts: nothing here says how long a dispatch takes or how "
        f"{_plural('rank', 2)} share the load, and no figure of another model's publication is "
        "confirmed or refuted."
    )
    sentences.append(
        f"The intervals resample passes ({result.num_batches} a condition, {result.batch_size} sequences "
        "each, drawn at random from the whole text): they say how far other sequences of the same texts "
        "would move the figures, not how other texts, seeds or models would."
    )
    if result.uncovered:
        names = ", ".join(name for name, _ in result.uncovered[:3])
        count = len(result.uncovered)
        sentences.append(
            f"{count} routing {_plural('part', count)} of the model could not be observed ({names})."
        )
    return sentences


def verdict(interval: Interval) -> str:
    """Where a ratio's interval lies relative to 1: `above`, `below`, `level`, or `unknown` if not finite.

    Ends are compared as they are printed, with two digits: "1.00 to 1.05" is level.
    """
    low, high = interval
    if not (isfinite(low) or isfinite(high)):
        return "unknown"
    if round(low, 2) > 1:
        return "above"
    return "below" if round(high, 2) < 1 else "level"


def load_correlation(a: ConditionResult, b: ConditionResult) -> float:
    """Pearson correlation of expert counts, mean over the layers where both vary; nan if there is none."""
    values = []
    for x, y in zip(a.layers, b.layers, strict=True):
        if np.ptp(x.counts) > 0 and np.ptp(y.counts) > 0:
            values.append(float(np.corrcoef(x.counts, y.counts)[0, 1]))
    return float(np.mean(values)) if values else float("nan")


def _uniform_over_real(result: Result) -> Iterator[str]:
    # Uniform ids are the usual mock; without them the first mock stands for all.
    mocks = sorted(result.of_kind("mock"), key=lambda c: c.source != "mock-uniform")
    for real in result.of_kind("real") if mocks else []:
        mock = mocks[0]
        ratio = result.ratio(mock.name, real.name)
        if ratio is None or not isfinite(ratio.corrected):
            yield (
                f"The routing of {real.name} cannot be told from uniform routing at this number of "
                f"tokens, so there is no ratio of {mock.name} over {real.name}."
            )
            continue
        verb = {
            "above": "overestimates",
            "below": "underestimates",
        }.get(verdict(ratio.corrected_interval), "neither over- nor underestimates")
        yield (
            f"The {mock.name} {verb} the routing imbalance of {real.name}: corrected Gini "
            f"{mock.overall.corrected_gini:.3f} against {real.overall.corrected_gini:.3f}, ratio "
            f"{_ratio_text(ratio)}; it is the larger in {ratio.layers_above} of {len(real.layers)} layers."
        )


def _all_ratios(result: Result) -> Iterator[str]:
    mocks = {c.name for c in result.of_kind("mock")}
    ratios = [r for r in result.ratios if r.numerator in mocks and isfinite(r.corrected)]
    if len(ratios) < 2:
        return
    kinds = [verdict(r.corrected_interval) for r in ratios]
    low, high = min(ratios, key=lambda r: r.corrected), max(ratios, key=lambda r: r.corrected)
    yield (
        f"Of the {len(ratios)} comparisons of a mock with a real text, {kinds.count('above')} lie above 1, "
        f"{kinds.count('below')} below, and {len(kinds) - kinds.count('above') - kinds.count('below')} "
        f"cannot be told from 1; they run from {low.corrected:.2f} ({_pair(low)}) to "
        f"{high.corrected:.2f} ({_pair(high)})."
    )


def _ladder(result: Result) -> Iterator[str]:
    for real in result.of_kind("real"):
        for condition in result.conditions:
            unigram = condition.source == f"mock-unigram:{real.source}"
            shuffled = condition.source == f"shuffled:{real.source}"
            ratio = result.ratio(condition.name, real.name)
            if not (unigram or shuffled) or ratio is None or not isfinite(ratio.corrected):
                continue
            what = (
                "dealt out at random over all sequences"
                if unigram
                else "in random order within each sequence"
            )
            kind = verdict(ratio.corrected_interval)
            start = f"The very tokens of {real.name}, {what}, give {_ratio_text(ratio)} of its corrected Gini: "
            lost = (
                "token frequencies alone"
                if unigram
                else "the tokens of each sequence, without their order,"
            )
            if kind == "level":
                yield (
                    f"{start}as far as this run can tell, {lost} account for the imbalance of the text."
                )
            else:
                side = "overstate" if kind == "above" else "understate"
                share = abs(ratio.corrected - 1)
                yield f"{start}{lost} {side} the imbalance of the text by {share:.0%}."


def _real_texts(result: Result) -> Iterator[str]:
    real = sorted(result.of_kind("real"), key=lambda c: c.overall.corrected_gini)
    if len(real) < 2:
        return
    least, most = real[0], real[-1]
    values = f"corrected Gini {_gini_text(least)} against {_gini_text(most)}"
    if least.overall.corrected_gini_interval[1] < most.overall.corrected_gini_interval[0]:
        yield f"Real texts differ too: {least.name} is routed more evenly than {most.name}, {values}."
    else:
        yield (
            f"This run does not tell {least.name} and {most.name} apart by imbalance: their "
            f"intervals overlap, {values}."
        )


def _same_experts(result: Result) -> Iterator[str]:
    real = result.of_kind("real")
    if not real:
        return
    others = [(load_correlation(c, real[0]), c.name) for c in result.conditions if c is not real[0]]
    others = sorted((pair for pair in others if isfinite(pair[0])), reverse=True)
    if len(others) < 2:
        return
    (high, most), (low, least) = others[0], others[-1]
    yield (
        f"Which experts are busy is another question than how unevenly: the expert loads of {real[0].name} "
        f"correlate most with those of {most} ({high:.2f}) and least with those of {least} ({low:.2f})."
    )


def _busiest(result: Result) -> Iterator[str]:
    if not result.of_kind("real"):
        return
    real = result.of_kind("real")[0]
    extreme = max(result.conditions, key=lambda c: c.overall.max_over_mean)
    yield (
        f"The busiest expert of a layer gets {real.overall.max_over_mean:.1f} times the mean in a pass of "
        f"{real.name}, where uniform routing would give {real.overall.null_max_over_mean:.1f}; the most extreme "
        f"condition is {extreme.name} with {extreme.overall.max_over_mean:.1f}."
    )


def _unused(result: Result) -> Iterator[str]:
    experts = result.conditions[0].layers[0].num_experts
    idle = [c for c in result.conditions if c.overall.unused_experts > 0]
    if not idle:
        yield f"Every expert of every layer was used under every condition (up to {experts} a layer)."
        return
    parts = ", ".join(f"{c.overall.unused_experts:.1f} under {c.name}" for c in idle)
    rest = len(result.conditions) - len(idle)
    tail = f"; none under the other {rest} {_plural('condition', rest)}" if rest else ""
    yield f"Experts of a layer (of {experts}) that got nothing in the whole window, on average: {parts}{tail}."


def _floor(result: Result) -> Iterator[str]:
    for real in result.of_kind("real")[:1]:
        overall = real.overall
        moved = overall.gini - overall.corrected_gini
        effect = "barely matters" if abs(moved) < SMALL_CORRECTION else "matters"
        yield (
            f"Perfectly uniform routing would show a Gini of {overall.null_gini:.3f} in a pass of this size; "
            f"taking that out moves {real.name} from {overall.gini:.3f} to {overall.corrected_gini:.3f}, "
            f"so the null floor {effect} here."
        )
    flat = [c.name for c in result.conditions if c.overall.corrected_gini == 0]
    if flat:
        yield f"Not to be told from uniform routing: {', '.join(flat)}."


def _window(result: Result) -> Iterator[str]:
    conditions = result.of_kind("real")
    if not conditions:
        return
    widest = max(conditions, key=lambda c: c.overall.gini - c.overall.window_gini)
    gap = widest.overall.gini - widest.overall.window_gini
    effect = (
        "hides skew that single passes have" if gap >= SMALL_CORRECTION else "shows nearly the same"
    )
    yield (
        f"Counted over the whole window instead of pass by pass, the Gini of {widest.name} is "
        f"{widest.overall.window_gini:.3f} instead of {widest.overall.gini:.3f}: the window {effect}."
    )


def _learned(result: Result) -> Iterator[str]:
    training = result.model.training
    if training is None:
        return
    for real in result.of_kind("real"):
        baseline = training["unigram_loss"].get(real.source.removeprefix("builtin:"))
        if baseline is None or not isfinite(real.loss):
            continue
        gain = baseline - real.loss
        loss = f"{real.loss:.2f} nats a token on held-out {real.name}"
        if gain > 0:
            yield (
                f"The model has learned from context: {loss}, {gain:.2f} below the unigram baseline "
                f"of {baseline:.2f}."
            )
        else:
            yield (
                f"The model has learned nothing from context: {loss}, no better than the unigram "
                f"baseline of {baseline:.2f}; read its routing as that of an untrained model."
            )


def _ratio_text(ratio: Ratio) -> str:
    low, high = ratio.corrected_interval
    return f"{ratio.corrected:.2f} (95 % interval {low:.2f} to {high:.2f})"


def _gini_text(condition: ConditionResult) -> str:
    low, high = condition.overall.corrected_gini_interval
    return f"{condition.overall.corrected_gini:.3f} ({low:.3f} to {high:.3f})"


def _pair(ratio: Ratio) -> str:
    return f"{ratio.numerator} over {ratio.denominator}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
