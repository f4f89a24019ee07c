"""Runs a model over data conditions and reads its routing back from the recording."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

import dodoco_ext as dodoco
from dodoco_ext.errors import DodocoError
from dodoco_ext.observatory import summary
from dodoco_ext.observatory.conditions import Condition, ConditionBuilder, Ids, Shape, Subject
from dodoco_ext.observatory.corpus import BUILTIN_NAMES, builtin_corpora
from dodoco_ext.observatory.models import check_vocabulary
from dodoco_ext.observatory.packaged import SOURCES, packaged_corpus
from dodoco_ext.observatory.result import ConditionResult, ModelFacts, Result
from dodoco_ext.recording import ROUTE, Cursor

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
) -> tuple[Result, Path]:
    """Observes a model under every source, at equal numbers of tokens, in one recording.

    Args:
        model: A causal language model of transformers with MoE layers; called as it is, in
            evaluation mode, without padding.
        tokenizer: Its tokenizer.
        sources: SOURCE of each condition (see `conditions.ConditionBuilder`).
        name: How reports call the model.
        shape: Tokens a condition.
        seed: Seed of the conditions and of the bootstrap.
        facts: What is known of the model; by default what it says itself.
        progress: Told of every pass.

    Returns:
        The result, and the recording's file.

    Raises:
        InputError: A source cannot be used.
        NothingToObserve: The model has no MoE router.
        DodocoError: The recording lost records, or something else ran the model meanwhile.
    """
    check_vocabulary(model, tokenizer, name)
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    results = []
    try:
        # Attached before the data is read: a dense model is refused at once.
        with dodoco.attach(model, labels={"model_name": name}) as attachment:
            attachment.record_every = 1
            subject = Subject(_embedding_rows(model), _continuation(model))
            conditions = ConditionBuilder(tokenizer, shape, seed, subject).build(sources)
            for condition in conditions:
                window, loss = _feed(model, attachment, condition, shape, progress)
                results.append(_result(condition, window, loss, seed))
            uncovered = [(part.name, part.reason) for part in attachment.uncovered]
    finally:
        model.train(was_training)
    result = Result(
        model=facts or facts_of(model, name),
        seed=seed,
        batch_size=shape.batch_size,
        num_batches=shape.num_batches,
        conditions=results,
        ratios=summary.ratios(results, seed),
        uncovered=uncovered,
        texts=_texts_of(sources),
        provenance=provenance(),
        seconds=time.perf_counter() - started,
        bos=shape.bos,
        padding=shape.padding,
    )
    return result, attachment.path


def facts_of(model: Any, name: str) -> ModelFacts:
    """What a model says of itself."""
    return ModelFacts(
        name=name,
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=_embedding_rows(model),
    )


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


def _embedding_rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _continuation(model: Any) -> Callable[[Ids, int, int], Ids]:
    """Continues prompts by drawing from the model's own distribution, reproducibly."""

    def continue_text(prompts: Ids, num_tokens: int, seed: int) -> Ids:
        ids = torch.from_numpy(prompts)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            for _ in range(num_tokens):
                # Without a cache: some mixers' caches change the arithmetic, and the text is short.
                logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
                ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return ids.numpy()

    return continue_text


def _feed(
    model: Any,
    attachment: dodoco.Attachment,
    condition: Condition,
    shape: Shape,
    progress: Progress | None,
) -> tuple[summary.Window, float]:
    num_layers = len(attachment.layers)
    before = attachment.snapshot()
    cursor = attachment.reader.cursor()
    passes, losses = [], []
    for number, start in enumerate(range(0, len(condition.ids), shape.batch_size), start=1):
        ids = torch.from_numpy(condition.ids[start : start + shape.batch_size])
        inputs = {"input_ids": ids}
        if shape.padding:
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][:, -shape.padding :] = 0
        with torch.inference_mode():
            losses.append(_loss(model(**inputs, use_cache=False), ids, shape.padding))
        records, cursor = _one_pass(attachment, cursor, num_layers)
        passes.append(records)
        if progress is not None:
            progress(condition.name, number, shape.num_batches)
    window = summary.Window(attachment.snapshot() - before, passes)
    window.check()
    return window, float(np.mean(losses))


def _one_pass(
    attachment: dodoco.Attachment, cursor: Cursor, num_layers: int
) -> tuple[NDArray[np.void], Cursor]:
    """The records of the pass that just ran, one a layer, in layer order."""
    records, cursor, lost = attachment.reader.read(cursor)
    records = records[(records["type"] == ROUTE) & ~records["recompute"]]
    if lost or sorted(records["layer"]) != list(range(num_layers)):
        raise DodocoError(
            f"a pass left {len(records)} records of {num_layers} layers ({lost} lost): every MoE layer "
            "must run once a pass, and a recording (DODOCO_MAX_BYTES) must hold at least one pass"
        )
    return records[np.argsort(records["layer"])], cursor


def _loss(output: Any, ids: torch.Tensor, padding: int) -> float:
    logits = getattr(output, "logits", None)
    if logits is None:
        return float("nan")
    end = ids.shape[1] - padding
    predicted = logits[:, : end - 1].flatten(0, 1).float()
    return float(functional.cross_entropy(predicted, ids[:, 1:end].flatten()))


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


def _texts_of(sources: Sequence[str]) -> dict[str, str]:
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
