"""Running a model of transformers: whole, or layer by layer over all passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import dodoco_ext as dodoco
from dodoco_ext.counters import LayerSnapshot
from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory.conditions import Ids, Shape
from dodoco_ext.observatory.positions import without_first
from dodoco_ext.observatory.runners import (
    Inputs,
    Recorded,
    Runner,
    RunPasses,
    Told,
    first_positions,
    in_layer_order,
    loss_of,
    new_records,
    pass_after_pass,
)
from dodoco_ext.observatory.summary import Window

if TYPE_CHECKING:
    from dodoco_ext.observatory.streamed import StreamedModel


class Resident(Runner):
    """A causal language model of transformers, called as it is, in evaluation mode.

    Args:
        model: With MoE layers; on any devices, offloaded or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def embedding_rows(self) -> int:
        """Ids that the model embeds."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @contextmanager
    def attach(self, name: str) -> Iterator[Recorded]:
        """Records the model's routing; it is in evaluation mode meanwhile."""
        was_training = self.model.training
        self.model.eval()
        try:
            with dodoco.attach(self.model, labels={"model_name": name}) as attachment:
                yield attachment
        finally:
            self.model.train(was_training)

    def continue_text(self, prompts: Ids, num_tokens: int, seed: int) -> Ids:
        """Draws the continuation token by token."""
        ids = torch.from_numpy(prompts).to(self._device)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            for _ in range(num_tokens):
                # Without a cache: some mixers' caches change the arithmetic, and the text is short.
                logits = self.model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
                drawn = torch.multinomial(logits.softmax(-1), 1)
                ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
        return ids.cpu().numpy()

    def run_passes(
        self, recorded: Recorded, batches: list[Inputs], shape: Shape, told: Told
    ) -> RunPasses:
        """Runs pass after pass."""

        @torch.inference_mode()
        def run(inputs: Inputs) -> float:
            output = self.model(**self._placed(inputs), use_cache=False)
            return loss_of(output, inputs["input_ids"].to(self._device), shape.padding)

        @torch.inference_mode()
        def run_first(inputs: Inputs) -> None:
            self.model(**self._placed(first_positions(inputs)), use_cache=False)

        return pass_after_pass(recorded, batches, shape, told, run, run_first)

    def provenance(self) -> dict[str, str]:
        """Engine, data type, placement and backends."""
        facts = {
            "engine": "transformers",
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "placement": _placement(self.model),
        }
        for key, attribute in (
            ("attention backend", "_attn_implementation"),
            ("experts backend", "_experts_implementation"),
        ):
            if value := getattr(self.model.config, attribute, None):
                facts[key] = str(value)
        return facts

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def _placed(self, inputs: Inputs) -> Inputs:
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}


class Streamed(Resident):
    """A model larger than memory: layer after layer, each over all passes.

    Args:
        streamed: The model, and what reads its layers.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        super().__init__(streamed.model)
        self._streamed = streamed

    @classmethod
    def refuse(cls, sources: Sequence[str], shape: Shape) -> None:
        """Refuses what would read the whole checkpoint again for every token."""
        for source in sources:
            if source.startswith("generated:"):
                raise InputError(
                    f"a streamed model generates nothing: leave out {source} or --streamed"
                )

    def continue_text(self, prompts: Ids, num_tokens: int, seed: int) -> Ids:
        """Refuses, as `refuse()` does."""
        raise InputError("a streamed model generates nothing: leave out generated:SOURCE")

    def run_passes(
        self, recorded: Recorded, batches: list[Inputs], shape: Shape, told: Told
    ) -> RunPasses:
        """Runs layer after layer."""
        if not shape.first_position:
            return self._without_first(recorded, batches, shape, told)
        cursor, before = recorded.reader.cursor(), recorded.snapshot()
        layers: list[NDArray[np.void]] = []
        counts: list[list[NDArray[np.int64]]] = [[] for _ in batches]
        last = before

        def after_pass(number: int) -> None:
            nonlocal last
            now = recorded.snapshot()
            ran = [layer for layer in (now - last).layers if layer.passes]  # none if it is dense
            counts[number] += [layer.counts.astype(np.int64) for layer in ran]
            last = now

        def after_layer(done: int, total: int) -> None:
            nonlocal cursor
            records, cursor = new_records(recorded, cursor)
            layers.append(records)  # none where the layer is dense
            told(done, total)

        losses = [
            loss_of(output, inputs["input_ids"], shape.padding)
            for output, inputs in zip(
                self._streamed.run(batches, after_layer, after_pass), batches, strict=True
            )
        ]
        records = np.concatenate(layers)
        num_layers = len(recorded.layers)
        if len(records) != num_layers * len(batches):
            raise DodocoError(
                f"{len(batches)} passes left {len(records)} records of {num_layers} layers: every MoE "
                "layer must run once a pass"
            )
        by_layer = records[np.argsort(records["layer"], kind="stable")].reshape(num_layers, -1)
        passes = [in_layer_order(by_layer[:, n], num_layers) for n in range(len(batches))]
        return Window(recorded.snapshot() - before, passes, counts), losses

    def _without_first(
        self, recorded: Recorded, batches: list[Inputs], shape: Shape, told: Told
    ) -> RunPasses:
        """Each batch is followed by its first positions alone, in every layer."""
        doubled = [part for inputs in batches for part in (inputs, first_positions(inputs))]
        counted: list[list[LayerSnapshot]] = [[] for _ in doubled]
        before = start = recorded.snapshot()

        def after_pass(number: int) -> None:
            nonlocal before
            now = recorded.snapshot()
            counted[number] += [layer for layer in (now - before).layers if layer.passes]
            before = now

        outputs = self._streamed.run(doubled, told, after_pass)
        losses = [
            loss_of(output, inputs["input_ids"], shape.padding)
            for number, (output, inputs) in enumerate(zip(outputs, doubled, strict=True))
            if number % 2 == 0
        ]
        num_layers = len(recorded.layers)
        if any(len(layers) != num_layers for layers in counted):
            raise DodocoError(f"every one of {num_layers} MoE layers must run once a pass")
        boards = [replace(before - start, layers=tuple(layers)) for layers in counted]
        return without_first(list(zip(boards[::2], boards[1::2], strict=True))), losses


def _placement(model: Any) -> str:
    """Where the weights are; of a streamed model the layers to come are on `meta`."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    if offloaded := getattr(model, "hf_device_map", None):
        # Offloaded weights are on `meta`, and come from where accelerate keeps them.
        kinds = (kinds - {"meta"}) | {str(device) for device in offloaded.values()}
    return ", ".join(sorted(kinds))
