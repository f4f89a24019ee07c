"""Acquires cells: feeds a model sequence after sequence, and reads each one's counts off the recording.

In a dropless model that is evaluated teacher-forced, a sequence is routed without regard to those
beside it: counts of any batch are sums of its sequences' (tests/test_grid_batches.py runs both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.conditions import Condition, ConditionBuilder, Shape, Subject
from dodoco_ext.observatory.grid import cells
from dodoco_ext.observatory.grid.cells import Cell, Key
from dodoco_ext.observatory.loading import Loading
from dodoco_ext.observatory.models import LoadedModel, load_model, quiet
from dodoco_ext.observatory.observe import provenance
from dodoco_ext.observatory.runners import Inputs, Runner

Told = Callable[[int], None]
"""Called with the sequences done since the last call."""


@dataclass(frozen=True)
class Plan:
    """What determines a grid.

    Attributes:
        models: As `--model` takes them.
        sources: SOURCE of each condition.
        shape: A draw's sequences; `batch_size` is the size of the passes whose imbalance is reported.
        seed: Of everything random.
        num_draws: Independent draws of every condition.
        loading: How models are loaded.
    """

    models: tuple[str, ...]
    sources: tuple[str, ...]
    shape: Shape
    seed: int
    num_draws: int
    loading: Loading = field(default_factory=Loading)

    @property
    def sequences_a_cell(self) -> int:
        """Sequences of a condition, all draws."""
        return self.shape.num_sequences * self.num_draws


class Subjects:
    """The models of a plan, one at a time, each with its conditions.

    Args:
        plan: What to acquire.
        folder: Where cells are kept.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self._loaded: tuple[str, LoadedModel] | None = None
        self._conditions: dict[str, list[list[Condition]]] = {}

    def acquire(self, model: str, number: int, told: Told) -> tuple[Path, str]:
        """Makes sure that a cell is there.

        Args:
            model: One of the plan's.
            number: Of the condition, in the plan's order.
            told: Told of sequences that are run.

        Returns:
            The cell's file, and "new", "kept", or what was wrong with the file that was there.
        """
        loaded = self._load(model)
        draws = [conditions[number] for conditions in self._draws(model, loaded)]
        key = _key(self.plan, loaded, draws)
        path = self.folder / cells.file_name(loaded.name, draws[0].name)
        try:
            cells.read_wanted(path, key)
        except FileNotFoundError:
            status = "new"
        except cells.BadCellError as error:
            status = str(error)
        else:
            return path, "kept"
        cells.write(run_cell(loaded, draws, self.plan.shape, key, told), path)
        return path, status

    def _load(self, model: str) -> LoadedModel:
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # the last one goes before the next one comes
            with quiet():
                loaded = load_model(
                    model,
                    self.plan.loading,
                    shape=one_by_one(self.plan.shape, 1),
                    sources=self.plan.sources,
                )
            self._loaded = (model, loaded)
        return self._loaded[1]

    def _draws(self, model: str, loaded: LoadedModel) -> list[list[Condition]]:
        """The conditions of every draw; those of one tokenizer serve all of its models."""
        made = any(
            s.startswith(("generated:", "mock-uniform:embedding")) for s in self.plan.sources
        )
        same = model if made else loaded.provenance.get("tokenizer sha256", model)
        if same not in self._conditions:
            runner, plan = loaded.runner, self.plan
            subject = Subject(runner.embedding_rows, runner.continue_text)
            self._conditions = {
                same: [
                    ConditionBuilder(
                        loaded.tokenizer,
                        plan.shape,
                        plan.seed,
                        subject,
                        draw=draw,
                        num_draws=plan.num_draws,
                    ).build(plan.sources)
                    for draw in range(plan.num_draws)
                ]
            }
        return self._conditions[same]


def run_cell(
    loaded: LoadedModel, draws: Sequence[Condition], shape: Shape, key: Key, told: Told
) -> Cell:
    """Runs every sequence of a condition as a pass of its own.

    Args:
        loaded: The model.
        draws: The condition, once a draw.
        shape: Of a draw.
        key: What determines the cell.
        told: Told of sequences.

    Raises:
        InputError: The model's layers have different numbers of experts.
        DodocoError: The recording lost records, or something else ran the model meanwhile.
    """
    runner, first = loaded.runner, draws[0]
    single = one_by_one(shape, len(draws) * shape.num_sequences)
    ids = torch.from_numpy(np.concatenate([condition.ids for condition in draws]))
    steps = 0

    def count(done: int, total: int) -> None:
        nonlocal steps
        now = single.num_batches * done // total  # streamed models tell of layers
        told(now - steps)
        steps = now

    with quiet(), runner.attach(loaded.name) as recorded:
        recorded.record_every = 1
        window, losses = runner.run_passes(recorded, list(_inputs(ids, shape)), single, count)
        window.check()
        uncovered = [f"{part.name}: {part.reason}" for part in recorded.uncovered]
    layers = window.board.layers
    sizes = {layer.num_experts for layer in layers}
    if len(sizes) > 1:
        raise InputError(
            f"{loaded.name} has layers of {sorted(sizes)} experts: a grid needs equal layers; "
            "observe this model by itself"
        )
    counts = np.array(window.counts, dtype=np.int32)
    if np.ptp(counts.sum(axis=-1), axis=0).any():
        raise InputError(
            f"{loaded.name} routed unequal numbers of assignments of equal sequences: a grid needs a "
            "dropless model; observe this one by itself"
        )
    return Cell(
        model=loaded.name,
        name=first.name,
        kind=first.kind,
        source=first.source,
        description=first.description,
        counts=counts.reshape(len(draws), shape.num_sequences, *counts.shape[1:]),
        losses=np.array(losses, dtype=np.float64).reshape(len(draws), -1),
        top_k=[x.top_k or round(x.assignments / max(x.tokens, 1)) for x in layers],
        layer_names=[layer.name for layer in layers],
        key=key,
        facts=_facts(runner, loaded, uncovered),
    )


def one_by_one(shape: Shape, num_sequences: int) -> Shape:
    """Passes of one sequence each."""
    return replace(shape, batch_size=1, num_batches=max(num_sequences, 2))


def _inputs(ids: torch.Tensor, shape: Shape) -> Iterator[Inputs]:
    for row in ids.split(1):
        inputs = {"input_ids": row}
        if shape.padding:
            inputs["attention_mask"] = torch.ones_like(row)
            inputs["attention_mask"][:, -shape.padding :] = 0
        yield inputs


def _key(plan: Plan, loaded: LoadedModel, draws: Sequence[Condition]) -> Key:
    facts = {**provenance(), **loaded.provenance}
    machine = ("machine", "threads", "commit", "placement", "python")
    return {
        "model": loaded.name,
        "source": draws[0].source,
        "data": [condition.sha256 for condition in draws],
        "shape": asdict(plan.shape),
        "seed": plan.seed,
        "draws": plan.num_draws,
        "software": {k: v for k, v in facts.items() if k not in machine},
    }


def _facts(runner: Runner, loaded: LoadedModel, uncovered: list[str]) -> dict[str, Any]:
    model = asdict(runner.facts(loaded.name))
    return {
        "architecture": model["architecture"],
        "num_parameters": model["num_parameters"],
        "vocab_size": model["vocab_size"],
        "uncovered": uncovered,
        "provenance": {**provenance(), **loaded.provenance},
    }
