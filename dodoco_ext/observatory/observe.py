"""Runs a model over data conditions and reads its routing back from the recording."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dodoco_ext as dodoco
from dodoco_ext.observatory import summary
from dodoco_ext.observatory.conditions import Condition, ConditionBuilder, Shape, Subject
from dodoco_ext.observatory.corpus import BUILTIN_NAMES, builtin_corpora
from dodoco_ext.observatory.models import check_vocabulary
from dodoco_ext.observatory.packaged import SOURCES, packaged_corpus
from dodoco_ext.observatory.resident import Resident
from dodoco_ext.observatory.result import ConditionResult, ModelFacts, Result
from dodoco_ext.observatory.runners import Recorded, Runner

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done in it and its steps in all."""


def run(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    name: str,
    shape: Shape,
    seed: int = 0,
    facts: ModelFacts | None = None,
    progress: Progress | None = None,
    checkpoint: Mapping[str, str] | None = None,
) -> tuple[Result, Path]:
    """Observes a model under every source, at equal numbers of tokens, in one recording.

    Args:
        model: What runs the model (`runners.Runner`), or a causal language model of transformers
            with MoE layers, to be run as it is.
        tokenizer: Its tokenizer.
        sources: SOURCE of each condition (see `conditions.ConditionBuilder`).
        name: How reports call the model.
        shape: Tokens a condition.
        seed: Seed of the conditions and of the bootstrap.
        facts: What is known of the model; by default what it says itself.
        progress: Told of every pass, or of every layer where the model is streamed.
        checkpoint: Where the model is from (`models.provenance_of`), for the result's provenance.

    Returns:
        The result, and the recording's file.

    Raises:
        InputError: A source cannot be used, or a condition not with this runner.
        NothingToObserve: The model has no MoE router.
        DodocoError: The recording lost records, or something else ran the model meanwhile.
    """
    runner = model if isinstance(model, Runner) else Resident(model)
    check_vocabulary(runner.embedding_rows, tokenizer, name)
    runner.refuse(sources, shape)
    started = time.perf_counter()
    results = []
    # Attached before the data is read: a dense model is refused at once.
    with runner.attach(name) as recorded:
        recorded.record_every = 1
        subject = Subject(runner.embedding_rows, runner.continue_text)
        conditions = ConditionBuilder(tokenizer, shape, seed, subject).build(sources)
        for condition in conditions:
            window, loss = _feed(runner, recorded, condition, shape, progress)
            results.append(_result(condition, window, loss, seed))
        uncovered = [(part.name, part.reason) for part in recorded.uncovered]
    result = Result(
        model=facts or runner.facts(name),
        seed=seed,
        batch_size=shape.batch_size,
        num_batches=shape.num_batches,
        conditions=results,
        ratios=summary.ratios(results, seed),
        uncovered=uncovered,
        texts=texts_of(sources),
        provenance={**provenance(), **(checkpoint or {}), "lost records": "0"},
        seconds=time.perf_counter() - started,
        bos=shape.bos,
        padding=shape.padding,
        first_position=shape.first_position,
    )
    return result, recorded.path


def provenance() -> dict[str, str]:
    """Software, commit and machine, without host names and paths."""
    facts = {"dodoco-ext": dodoco.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue  # torch and transformers may come without metadata in vendors' builds
    if commit := _commit():
        facts["commit"] = commit
    cores = len(os.sched_getaffinity(0))
    facts["machine"] = f"{platform.system()} {platform.machine()}, {cores} CPU cores"
    facts["threads"] = str(torch.get_num_threads())
    return facts


def _feed(
    runner: Runner,
    recorded: Recorded,
    condition: Condition,
    shape: Shape,
    progress: Progress | None,
) -> tuple[summary.Window, float]:
    batches = []
    for start in range(0, len(condition.ids), shape.batch_size):
        ids = torch.from_numpy(condition.ids[start : start + shape.batch_size])
        inputs = {"input_ids": ids}
        if shape.padding:
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][:, -shape.padding :] = 0
        batches.append(inputs)

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(condition.name, done, total)

    window, losses = runner.run_passes(recorded, batches, shape, told)
    window.check()
    return window, float(np.mean(losses))


def _result(
    condition: Condition, window: summary.Window, loss: float, seed: int
) -> ConditionResult:
    figures = summary.summarise(window, seed)
    num_sequences, length = condition.ids.shape
    return ConditionResult(
        name=condition.name,
        kind=condition.kind,
        source=condition.source,
        description=condition.description,
        sha256=condition.sha256,
        num_sequences=num_sequences,
        sequence_length=length,
        num_tokens=condition.ids.size,
        loss=loss,
        layers=figures.layers,
        overall=figures.overall,
        pass_gini=figures.pass_gini,
        pass_tokens=figures.pass_tokens,
    )


def texts_of(sources: Sequence[str]) -> dict[str, str]:
    """Digest of each built-in and packaged text that took part."""
    joined = " ".join(sources)
    found = {
        f"builtin:{name}": builtin_corpora()[name].sha256
        for name in BUILTIN_NAMES
        if f"builtin:{name}" in joined
    }
    for name in SOURCES:
        if f"packaged:{name}" in joined:
            found[f"packaged:{name}"] = packaged_corpus(name).sha256
    return found


def _commit() -> str | None:
    """The checkout's commit, where this package was built in one."""
    root = _git("rev-parse", "--show-toplevel")
    # The package may be installed inside some other project's checkout, whose commit says nothing.
    if root is None or not (Path(root) / "dodoco_ext" / "observatory").is_dir():
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
