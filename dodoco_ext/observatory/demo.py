"""The demo: the zoo's five models under six conditions, each with a report, and all side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.models import load_model, quiet
from dodoco_ext.observatory.result import Result
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo.card import Card
from dodoco_ext.observatory.zoo.shipped import PREFIX, model_folder
from dodoco_ext.observatory.zoo.species import SPECIES

SOURCES = (
    "mock-uniform",
    "mock-unigram:builtin:prose",
    "mock-repeat",
    "shuffled:builtin:prose",
    "builtin:prose",
    "builtin:code",
)
"""Six conditions: two real texts held out from training, and four ways to imitate the first."""

SHAPE = Shape(batch_size=8, sequence_length=128, num_batches=32)


@dataclass(frozen=True)
class Observed:
    """One model of the demo.

    Attributes:
        result: What was found.
        recording: The recording's file.
    """

    result: Result
    recording: Path


def run_demo(
    *,
    seed: int = 0,
    shape: Shape = SHAPE,
    names: Sequence[str] = tuple(SPECIES),
    progress: observe.Progress | None = None,
) -> dict[str, Observed]:
    """Observes the zoo's models, one after the other.

    Args:
        seed: Seed of conditions and bootstrap.
        shape: Tokens a condition.
        names: Which models.
        progress: Told of every pass.

    Returns:
        What was found, by the models' short names.
    """
    found = {}
    for name in names:
        loaded = load_model(f"{PREFIX}{name}")
        facts = replace(
            loaded.runner.facts(loaded.name),
            training=training_facts(Card.read(model_folder(name))),
        )
        # Quiet: where kernels of other packages are missing is no news for models this small.
        with one_thread(), quiet():
            result, recording = observe.run(
                loaded.runner,
                loaded.tokenizer,
                SOURCES,
                name=loaded.name,
                shape=shape,
                seed=seed,
                facts=facts,
                checkpoint=loaded.provenance,
                progress=None if progress is None else _named(progress, name),
            )
        found[name] = Observed(result, recording)
    return found


def training_facts(card: Card) -> dict[str, Any]:
    """A card as reports tell of a training."""
    return {
        "key": card.weights_sha256,
        "num_steps": card.num_steps,
        "num_tokens": card.num_tokens,
        "first_loss": card.first_loss,
        "last_loss": card.last_loss,
        "aux_loss": card.last_aux_loss,
        "unigram_loss": {name: costs.unigram for name, costs in card.held_out.items()},
        "cpu_seconds": card.cpu_seconds,
        "versions": card.versions,
    }


def _named(progress: observe.Progress, name: str) -> observe.Progress:
    return lambda phase, done, total: progress(f"{name}: {phase}", done, total)
