"""The demo: from nothing to a trained model, a recording of its routing and a report."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.corpus import builtin_corpora
from dodoco_ext.observatory.result import Result
from dodoco_ext.observatory.tiny import TinyConfig, one_thread, train_or_reuse

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
TRAINING = "training the demo model"
"""Name of the training phase in progress reports."""


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    shape: Shape = SHAPE,
    config: TinyConfig | None = None,
    retrain: bool = False,
    progress: observe.Progress | None = None,
) -> tuple[Result, Path]:
    """Trains the demo's model, or takes the one in `out/model`, and observes it.

    Args:
        out: Folder of the results; created if missing.
        seed: Seed of training, conditions and bootstrap.
        shape: Tokens a condition.
        config: Size and training of the model.
        retrain: Train even if a fitting model is there.
        progress: Told of every step and pass.

    Returns:
        The result, and the recording's file.
    """
    out.mkdir(parents=True, exist_ok=True)
    tiny = train_or_reuse(
        out / "model",
        builtin_corpora(),
        config or TinyConfig(),
        seed,
        retrain=retrain,
        progress=None if progress is None else lambda done, total: progress(TRAINING, done, total),
    )
    facts = replace(
        observe.facts_of(tiny.model, "demo model"),
        training=asdict(tiny.training),
        reused=tiny.reused,
    )
    with one_thread():
        return observe.run(
            tiny.model,
            tiny.tokenizer,
            SOURCES,
            name="demo model",
            shape=shape,
            seed=seed,
            facts=facts,
            progress=progress,
        )
