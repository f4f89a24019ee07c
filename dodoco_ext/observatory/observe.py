"""Runs a model over data conditions and reads its routing back from the recording."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

import dodoco_ext as dodoco
from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory import summary
from dodoco_ext.observatory.conditions import Condition, ConditionBuilder, Ids, Shape, Subject
from dodoco_ext.observatory.corpus import BUILTIN_NAMES, builtin_corpora
from dodoco_ext.observatory.models import check_vocabulary
from dodoco_ext.observatory.packaged import SOURCES, packaged_corpus
from dodoco_ext.observatory.positions import without_first
from dodoco_ext.observatory.result import ConditionResult, ModelFacts, Result
from dodoco_ext.recording import ROUTE, Cursor

if TYPE_CHECKING:
    from dodoco_ext.observatory.streamed import StreamedModel

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done in it and its steps in all."""

RunPasses = Callable[
    [dodoco.Attachment, list[dict[str, torch.Tensor]], Shape, Callable[[int, int], None]],
    tuple[summary.Window, list[float]],
]
"""Runs the passes of a condition: what they left in the recording, and their losses."""


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
    streamed: StreamedModel | None = None,
    checkpoint: Mapping[str, str] | None = None,
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
        progress: Told of every pass, or of every layer where the model is streamed.
        streamed: What runs the model layer by layer over all passes, if it is larger than memory.
        checkpoint: Where the model is from (`models.provenance_of`), for the result's provenance.

    Returns:
        The result, and the recording's file.

    Raises:
        InputError: A source cannot be used, or the shape not with a streamed model.
        NothingToObserve: The model has no MoE router.
        DodocoError: The recording lost records, or something else ran the model meanwhile.
    """
    check_vocabulary(model, tokenizer, name)
    if streamed is not None and not shape.first_position:
        raise InputError(
            "a streamed model keeps no counts of single passes: leave out --without-first or --streamed"
        )
    started = time.perf_counter()
    was_training = model.training
    run_passes = _resident(model) if streamed is None else _streamed(streamed)
    model.eval()
    results = []
    try:
        # Attached before the data is read: a dense model is refused at once.
        with dodoco.attach(model, labels={"model_name": name}) as attachment:
            attachment.record_every = 1
            subject = Subject(_embedding_rows(model), _continuation(model, streamed))
            conditions = ConditionBuilder(tokenizer, shape, seed, subject).build(sources)
            for condition in conditions:
                window, loss = _feed(run_passes, attachment, condition, shape, progress)
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
        provenance={**provenance(), **(checkpoint or {}), "lost records": "0"},
        seconds=time.perf_counter() - started,
        bos=shape.bos,
        padding=shape.padding,
        first_position=shape.first_position,
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


def _continuation(model: Any, streamed: StreamedModel | None) -> Callable[[Ids, int, int], Ids]:
    """Continues prompts by drawing from the model's own distribution, reproducibly."""

    def continue_text(prompts: Ids, num_tokens: int, seed: int) -> Ids:
        if streamed is not None:
            raise InputError("a streamed model generates nothing: leave out generated:SOURCE")
        ids = torch.from_numpy(prompts).to(_device_of(model))
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            for _ in range(num_tokens):
                # Without a cache: some mixers' caches change the arithmetic, and the text is short.
                logits = model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
                drawn = torch.multinomial(logits.softmax(-1), 1)
                ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
        return ids.cpu().numpy()

    return continue_text


def _feed(
    run_passes: RunPasses,
    attachment: dodoco.Attachment,
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

    window, losses = run_passes(attachment, batches, shape, told)
    window.check()
    return window, float(np.mean(losses))


def _resident(model: Any) -> RunPasses:
    """Runs pass after pass."""

    def run_passes(
        attachment: dodoco.Attachment,
        batches: list[dict[str, torch.Tensor]],
        shape: Shape,
        told: Callable[[int, int], None],
    ) -> tuple[summary.Window, list[float]]:
        device, num_layers = _device_of(model), len(attachment.layers)
        cursor, before = attachment.reader.cursor(), attachment.snapshot()
        passes, boards, losses = [], [], []
        for number, inputs in enumerate(batches, start=1):
            placed = {name: tensor.to(device) for name, tensor in inputs.items()}
            with torch.inference_mode():
                output = model(**placed, use_cache=False)
                losses.append(_loss(output, placed["input_ids"], shape.padding))
            records, cursor = _records(attachment, cursor)
            passes.append(_in_layer_order(records, num_layers))
            if not shape.first_position:
                whole = attachment.snapshot()
                with torch.inference_mode():
                    model(input_ids=placed["input_ids"][:, :1], use_cache=False)
                first = attachment.snapshot()
                boards.append((whole - before, first - whole))
                before, cursor = first, attachment.reader.cursor()
            told(number, len(batches))
        if not shape.first_position:
            return without_first(boards), losses
        return summary.Window(attachment.snapshot() - before, passes), losses

    return run_passes


def _streamed(streamed: StreamedModel) -> RunPasses:
    """Runs layer after layer, each over all passes."""

    def run_passes(
        attachment: dodoco.Attachment,
        batches: list[dict[str, torch.Tensor]],
        shape: Shape,
        told: Callable[[int, int], None],
    ) -> tuple[summary.Window, list[float]]:
        cursor, before = attachment.reader.cursor(), attachment.snapshot()
        layers: list[NDArray[np.void]] = []

        def after_layer(done: int, total: int) -> None:
            nonlocal cursor
            records, cursor = _records(attachment, cursor)
            layers.append(records)  # none where the layer is dense
            told(done, total)

        losses = [
            _loss(output, inputs["input_ids"], shape.padding)
            for output, inputs in zip(streamed.run(batches, after_layer), batches, strict=True)
        ]
        records = np.concatenate(layers)
        num_layers = len(attachment.layers)
        if len(records) != num_layers * len(batches):
            raise DodocoError(
                f"{len(batches)} passes left {len(records)} records of {num_layers} layers: every MoE "
                "layer must run once a pass"
            )
        by_layer = records[np.argsort(records["layer"], kind="stable")].reshape(num_layers, -1)
        passes = [_in_layer_order(by_layer[:, n], num_layers) for n in range(len(batches))]
        return summary.Window(attachment.snapshot() - before, passes), losses

    return run_passes


def _device_of(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _records(attachment: dodoco.Attachment, cursor: Cursor) -> tuple[NDArray[np.void], Cursor]:
    """The records since the cursor, none of them lost."""
    records, cursor, lost = attachment.reader.read(cursor)
    if lost:
        raise DodocoError(
            f"{lost} records were lost: a recording (DODOCO_MAX_BYTES) must hold at least one pass, or "
            "of a streamed model one layer of all passes"
        )
    return records[(records["type"] == ROUTE) & ~records["recompute"]], cursor


def _in_layer_order(records: NDArray[np.void], num_layers: int) -> NDArray[np.void]:
    """The records of one pass, one a layer."""
    if sorted(records["layer"]) != list(range(num_layers)):
        raise DodocoError(
            f"a pass left {len(records)} records of {num_layers} layers: every MoE layer must run "
            "once a pass"
        )
    return records[np.argsort(records["layer"])]


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
