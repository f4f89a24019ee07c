"""What runs a model over the passes of a condition, and reads from the recording what each left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory.conditions import Ids, Shape
from dodoco_ext.observatory.positions import without_first
from dodoco_ext.observatory.result import ModelFacts
from dodoco_ext.observatory.summary import Window, counts_of
from dodoco_ext.recorder import LayerSpec, Uncovered
from dodoco_ext.recording import ROUTE, Cursor, Reader

Inputs = dict[str, torch.Tensor]
"""`input_ids` [batch, length], and `attention_mask` where there is padding."""

Told = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

RunPasses = tuple[Window, list[float]]
"""What the passes left in the recording, and their losses."""


class Recorded(Protocol):
    """What is used of an attachment, whatever was attached to."""

    record_every: int

    @property
    def path(self) -> Path:
        """The recording's file."""

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The observed layers."""

    @property
    def uncovered(self) -> tuple[Uncovered, ...]:
        """What is not observed."""

    @property
    def reader(self) -> Reader:
        """A reader of the recording."""

    def snapshot(self) -> Snapshot:
        """The counters as they are now."""


class Runner(ABC):
    """A model with what runs it.

    Attributes:
        model: The module that computes; its class's name is what a report shows.
    """

    model: Any

    @property
    @abstractmethod
    def embedding_rows(self) -> int:
        """Ids that the model embeds."""

    @abstractmethod
    def attach(self, name: str) -> AbstractContextManager[Recorded]:
        """Records the model's routing while the context lasts."""

    @abstractmethod
    def run_passes(
        self, recorded: Recorded, batches: list[Inputs], shape: Shape, told: Told
    ) -> RunPasses:
        """Runs every batch once.

        Raises:
            DodocoError: A record was lost, or a layer did not run exactly once a pass.
        """

    @classmethod  # noqa: B027
    def refuse(cls, sources: Sequence[str], shape: Shape) -> None:
        """Raises InputError for what this way of running cannot do; asked before loading, too."""

    def continue_text(self, prompts: Ids, num_tokens: int, seed: int) -> Ids:
        """Continues prompts [N, P] by tokens drawn from the model's distribution, reproducibly."""
        raise InputError(f"{type(self).__name__} generates nothing: leave out generated:SOURCE")

    @abstractmethod
    def provenance(self) -> dict[str, str]:
        """Engine, data type, placement and backends, for a result's provenance."""

    def facts(self, name: str) -> ModelFacts:
        """What the model says of itself."""
        return ModelFacts(
            name=name,
            architecture=type(self.model).__name__,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            vocab_size=self.embedding_rows,
        )


def pass_after_pass(
    recorded: Recorded,
    batches: list[Inputs],
    shape: Shape,
    told: Told,
    run: Callable[[Inputs], float],
    run_first: Callable[[Inputs], None],
) -> RunPasses:
    """Runs one batch after the other.

    Args:
        recorded: Where the passes are recorded.
        batches: What to run.
        shape: Says whether first positions count.
        told: Told of every pass.
        run: Runs a batch and gives its loss.
        run_first: Runs the first positions of a batch alone.
    """
    num_layers = len(recorded.layers)
    cursor, start = recorded.reader.cursor(), recorded.snapshot()
    passes, boards, losses, counts = [], [], [], []
    before = start
    for number, inputs in enumerate(batches, start=1):
        losses.append(run(inputs))
        records, cursor = new_records(recorded, cursor)
        passes.append(in_layer_order(records, num_layers))
        after = recorded.snapshot()
        counts.append(counts_of(after - before))
        if not shape.first_position:
            run_first(inputs)
            first = recorded.snapshot()
            boards.append((after - before, first - after))
            after, cursor = first, recorded.reader.cursor()
        before = after
        told(number, len(batches))
    if not shape.first_position:
        return without_first(boards), losses
    return Window(before - start, passes, counts), losses


def new_records(recorded: Recorded, cursor: Cursor) -> tuple[NDArray[np.void], Cursor]:
    """The records since the cursor, none of them lost."""
    records, cursor, lost = recorded.reader.read(cursor)
    if lost:
        raise DodocoError(
            f"{lost} records were lost: a recording (DODOCO_MAX_BYTES) must hold at least one pass, or "
            "of a streamed model one layer of all passes"
        )
    return records[(records["type"] == ROUTE) & ~records["recompute"]], cursor


def in_layer_order(records: NDArray[np.void], num_layers: int) -> NDArray[np.void]:
    """The records of one pass, one a layer."""
    if sorted(records["layer"]) != list(range(num_layers)):
        raise DodocoError(
            f"a pass left {len(records)} records of {num_layers} layers: every MoE layer must run "
            "once a pass"
        )
    return records[np.argsort(records["layer"])]


def first_positions(inputs: Inputs) -> Inputs:
    """The first position of every sequence, which no padding can be in."""
    return {"input_ids": inputs["input_ids"][:, :1]}


def loss_of(output: Any, ids: torch.Tensor, padding: int) -> float:
    """Mean cost of a token that is not padding, given those before it, in nats."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return float("nan")
    end = ids.shape[1] - padding
    predicted = logits[:, : end - 1].flatten(0, 1).float()
    return float(functional.cross_entropy(predicted, ids[:, 1:end].flatten()))
