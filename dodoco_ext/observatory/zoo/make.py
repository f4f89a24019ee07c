"""Makes the zoo: trains its models, rounds and judges them, and writes each with its card."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dodoco_ext.observatory.corpus import BUILTIN_NAMES, Corpus, num_chars
from dodoco_ext.observatory.models import quiet
from dodoco_ext.observatory.packaged import packages_of
from dodoco_ext.observatory.threads import one_thread, software_versions
from dodoco_ext.observatory.zoo.baselines import Baselines
from dodoco_ext.observatory.zoo.card import (
    RETRAIN_INTERVAL,
    Card,
    balance_of,
    held_out_losses,
    mean_of,
    sha256_of_file,
)
from dodoco_ext.observatory.zoo.species import (
    NUM_EXPERTS,
    NUM_MOE_LAYERS,
    TOP_K,
    VOCAB_SIZE,
    Species,
)
from dodoco_ext.observatory.zoo.text import Data, prepare, tokenizer_of
from dodoco_ext.observatory.zoo.training import CHECKPOINT, Plan, Trained, train

Told = Callable[[str, int, int, float], None]
"""Called with a model's name, the steps done, the steps in all, and the last loss."""

TOKENIZER = "tokenizer"
DTYPE = torch.float16
"""In which weights are stored: at this size it loses less than bfloat16, in the same space."""


@dataclass(frozen=True, eq=False)
class Material:
    """What all models of a zoo share.

    Attributes:
        texts: The texts, by name.
        tokenizer: Learned from their training sides.
        data: The texts as ids.
        baselines: What the data costs without a model.
    """

    texts: Mapping[str, Corpus]
    tokenizer: Any
    data: Data
    baselines: Baselines


def prepare_material(texts: Mapping[str, Corpus], plan: Plan) -> Material:
    """Learns the tokenizer and encodes the texts."""
    tokenizer = tokenizer_of(texts, VOCAB_SIZE)
    data = prepare(texts, tokenizer, plan.sequence_length)
    return Material(texts, tokenizer, data, Baselines(list(data.train.values()), len(tokenizer)))


def make_zoo(
    kinds: Sequence[Species],
    material: Material,
    plan: Plan,
    seed: int,
    out: Path,
    told: Told | None = None,
) -> list[Card]:
    """Trains models and writes them to `out/NAME`, and their tokenizer to `out/tokenizer`.

    A model whose training was interrupted goes on from its checkpoint.

    Args:
        kinds: Which models.
        material: As from `prepare_material()`.
        plan: How much, and how fast.
        seed: Seed of initial weights and of the order of the data.
        out: Folder of the zoo; created if missing.
        told: Told after each step.
    """
    with quiet():
        material.tokenizer.save_pretrained(out / TOKENIZER)
    cards = []
    for kind in kinds:
        folder = out / kind.name
        started = time.process_time()
        trained = train(
            kind,
            material.data,
            plan,
            seed,
            folder=folder,
            progress=None if told is None else _named(told, kind.name),
        )
        seconds = time.process_time() - started
        cards.append(_finish(kind, trained, material, plan, seed, out, seconds))
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return cards


def _finish(
    kind: Species,
    trained: Trained,
    material: Material,
    plan: Plan,
    seed: int,
    out: Path,
    seconds: float,
) -> Card:
    from transformers import AutoModelForCausalLM

    folder = out / kind.name
    with quiet():
        trained.model.to(DTYPE).save_pretrained(folder)
        material.tokenizer.save_pretrained(folder)  # complete, for `dodoco observe --model`
        # What is judged is what is stored.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with one_thread():
        held_out = held_out_losses(model, material.data, material.baselines)
        balance = balance_of(model, material.data)
    mean = mean_of(held_out)
    packaged = tuple(name for name in material.texts if name not in BUILTIN_NAMES)
    card = Card(
        name=kind.name,
        mixer=kind.mixer,
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_moe_layers=NUM_MOE_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        balancing=kind.balancing.description,
        seed=seed,
        num_steps=plan.num_steps,
        num_tokens=plan.num_tokens,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        learning_rate=plan.learning_rate,
        first_loss=float(np.mean(trained.losses[:20])),
        last_loss=float(np.mean(trained.losses[-20:])),
        last_aux_loss=float(np.mean(trained.aux_losses[-20:])),
        held_out=held_out,
        mean=mean,
        margin=round(mean.bigram - mean.loss - RETRAIN_INTERVAL, 2),
        retrain_interval=RETRAIN_INTERVAL,
        balance=balance,
        texts={name: _facts(corpus) for name, corpus in material.texts.items()},
        packages=packages_of(packaged),
        data_sha256=material.data.sha256,
        tokenizer_sha256=sha256_of_file(out / TOKENIZER / "tokenizer.json"),
        weights_sha256=sha256_of_file(folder / "model.safetensors"),
        dtype=str(DTYPE).removeprefix("torch."),
        versions=software_versions(),
        cpu_seconds=round(seconds, 1),
    )
    card.write(folder)
    return card


def _facts(corpus: Corpus) -> dict[str, Any]:
    return {
        "train_chars": num_chars(corpus.train),
        "held_out_chars": num_chars(corpus.held_out),
        "sha256": corpus.sha256,
    }


def _named(told: Told, name: str) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: told(name, done, total, loss)
