"""A model's card: what it was trained on and how, and how well it does on text that training never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import dodoco_ext as dodoco
from dodoco_ext.errors import InputError
from dodoco_ext.observatory.zoo.baselines import Baselines
from dodoco_ext.observatory.zoo.text import LOW_RESOURCE, Data

CARD = "card.json"
RETRAIN_INTERVAL = 0.06
"""Training anew gives a held-out loss within this many nats of the card's, on either side.

The same seed on the same machine gives the same weights. Other machines and versions round
differently, and the paths then part as those of other seeds do: three seeds of `gqa` spread over 0.04.
"""
_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """One held-out text: mean cost of a token, in nats.

    Attributes:
        loss: Of the model.
        unigram, bigram: Of the baselines (`baselines.Baselines`).
    """

    loss: float
    unigram: float
    bigram: float


@dataclass(frozen=True)
class LayerBalance:
    """How one layer's router spreads the held-out text.

    Attributes:
        entropy: Of the experts' shares, over its maximum log E: 1 is uniform, log k / log E collapse.
        max_over_mean: Largest over mean count.
        unused: Experts that got nothing.
    """

    entropy: float
    max_over_mean: float
    unused: int


@dataclass(frozen=True)
class Card:
    """Everything a reader wants to know of one model of the zoo.

    Attributes:
        name, mixer, architecture: What it is.
        num_parameters, num_moe_layers, num_experts, top_k: Its size.
        balancing: How its router was balanced in training.
        seed, num_steps, num_tokens, batch_size, sequence_length, learning_rate: How it was trained.
        first_loss, last_loss: Training cross-entropy at both ends (means of 20 steps), nats a token.
        last_aux_loss: Balance loss at the end; 1 is balanced, E / k collapsed.
        held_out: By text; the low-resource language stands apart from `mean`.
        mean: Over the texts of training, all equally.
        margin: What `mean` stays below the bigram baseline by, also after training anew.
        retrain_interval: Training anew gives `mean.loss` within this much, in nats.
        balance: Of each mixture layer, on the held-out texts of training.
        texts: Training and held-out characters and digest of each text.
        packages: Digest of each file the texts are from, beside Python's own library.
        data_sha256, tokenizer_sha256, weights_sha256: Of the encoded texts, tokenizer and weights.
        dtype: In which the weights are stored; losses are of these rounded weights, in float32.
        versions: Software that can change the weights.
        cpu_seconds: Of training.
    """

    name: str
    mixer: str
    architecture: str
    num_parameters: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    balancing: str
    seed: int
    num_steps: int
    num_tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    first_loss: float
    last_loss: float
    last_aux_loss: float
    held_out: dict[str, HeldOut]
    mean: HeldOut
    margin: float
    retrain_interval: float
    balance: list[LayerBalance]
    texts: dict[str, dict[str, Any]]
    packages: dict[str, str]
    data_sha256: str
    tokenizer_sha256: str
    weights_sha256: str
    dtype: str
    versions: dict[str, str]
    cpu_seconds: float

    def write(self, folder: Path) -> None:
        """Writes the card beside the weights."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Card:
        """The card that lies in a folder.

        Raises:
            InputError: There is none, or it is no card of this version.
        """
        path = folder / CARD
        try:
            fields = json.loads(path.read_text("utf-8"))
            fields["held_out"] = {n: HeldOut(**f) for n, f in fields["held_out"].items()}
            fields["mean"] = HeldOut(**fields["mean"])
            fields["balance"] = [LayerBalance(**f) for f in fields["balance"]]
            return Card(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is not a card of the zoo ({error}): train the model again (make zoo)"
            ) from None


@torch.inference_mode()
def held_out_losses(model: Any, data: Data, baselines: Baselines) -> dict[str, HeldOut]:
    """Cost of the held-out texts under a model and under the baselines, by text."""
    found = {}
    for name, windows in data.held_out.items():
        losses = []
        for start in range(0, len(windows), _BATCH):
            ids = torch.from_numpy(windows[start : start + _BATCH])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses.append(
                functional.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                )
            )
        found[name] = HeldOut(float(torch.cat(losses).mean()), *baselines.losses(windows))
    return found


def mean_of(held_out: dict[str, HeldOut]) -> HeldOut:
    """Mean over the texts of training, all equally."""
    texts = [costs for name, costs in held_out.items() if name != LOW_RESOURCE]
    return HeldOut(
        *(float(np.mean([getattr(t, f) for t in texts])) for f in ("loss", "unigram", "bigram"))
    )


def balance_of(model: Any, data: Data) -> list[LayerBalance]:
    """How the layers' routers spread the held-out texts of training, as a recording counts it."""
    windows = np.concatenate([ids for name, ids in data.held_out.items() if name != LOW_RESOURCE])
    with dodoco.attach(model) as attachment:
        for start in range(0, len(windows), _BATCH):
            with torch.inference_mode():
                model(input_ids=torch.from_numpy(windows[start : start + _BATCH]), use_cache=False)
        layers = attachment.snapshot().layers
    return [_balance(np.asarray(layer.counts, np.float64)) for layer in layers]


def table(cards: Mapping[str, Card]) -> str:
    """The cards' main figures as a Markdown table."""
    lines = [
        "| model | parameters | unigram | bigram | loss | margin | retrained within | evenness | max/mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, card in cards.items():
        mean, worst = card.mean, min(card.balance, key=lambda layer: layer.entropy)
        lines.append(
            f"| `zoo:{name}` | {card.num_parameters:,} | {mean.unigram:.3f} | {mean.bigram:.3f} | "
            f"{mean.loss:.3f} | {card.margin:.2f} | ± {card.retrain_interval:.2f} | "
            f"{worst.entropy:.3f} | {max(layer.max_over_mean for layer in card.balance):.2f} |"
        )
    return "\n".join(lines)


def sha256_of_file(path: Path) -> str:
    """Digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _balance(counts: Any) -> LayerBalance:
    share = counts / counts.sum()
    used = share[share > 0]
    return LayerBalance(
        entropy=float(-(used * np.log(used)).sum() / np.log(len(counts))),
        max_over_mean=float(counts.max() / counts.mean()),
        unused=int((counts == 0).sum()),
    )
