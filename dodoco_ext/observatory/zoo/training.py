"""Trains one model of the zoo: equal steps and tokens for all, resumable, reproducible on one machine."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dodoco_ext.observatory.threads import one_thread, software_versions
from dodoco_ext.observatory.zoo.balance import Balancer
from dodoco_ext.observatory.zoo.species import TOP_K, Species, build
from dodoco_ext.observatory.zoo.text import Data

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the last step's cross-entropy."""

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Plan:
    """How every model of the zoo is trained.

    Attributes:
        num_steps, batch_size, sequence_length: Steps, sequences a step, tokens a sequence.
        learning_rate: Peak of a cosine schedule with linear warm-up over one step in twelve.
        checkpoint_every: Steps between two checkpoints.
    """

    num_steps: int = 3000
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 6e-3
    checkpoint_every: int = 300

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads."""
        return self.num_steps * self.batch_size * self.sequence_length

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        warmup = max(1, self.num_steps // 12)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return min((step + 1) / warmup, 0.05 + 0.95 * cosine)


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: In evaluation mode.
        losses: Cross-entropy of each step, nats a token.
        aux_losses: Balance loss of each step; 1 is balanced, E / k collapsed.
    """

    model: Any
    losses: list[float]
    aux_losses: list[float]


def train(
    kind: Species,
    data: Data,
    plan: Plan,
    seed: int,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains a model from nothing, or from the checkpoint of the same training in `folder`.

    The caller's random state is left as it was.

    Args:
        kind: Which model.
        data: What it reads.
        plan: How much, and how fast.
        seed: Seed of the initial weights and of the order of the data.
        folder: Where checkpoints are kept; none are written without one.
        progress: Told after each step.
    """
    key = _key(kind, data, plan, seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        run = _Run(kind, data, plan)
        if folder is not None:
            run.resume(folder / CHECKPOINT, key)
        while (done := len(run.losses)) < plan.num_steps:
            run.step()
            if folder is not None and (done + 1) % plan.checkpoint_every == 0:
                run.save(folder / CHECKPOINT, key)
            if progress is not None:
                progress(done + 1, plan.num_steps, run.losses[-1])
    return Trained(run.model.eval(), run.losses, run.aux_losses)


class _Run:
    """One training under way."""

    def __init__(self, kind: Species, data: Data, plan: Plan) -> None:
        self.model = build(kind)
        self.model.train()
        self.losses: list[float] = []
        self.aux_losses: list[float] = []
        self._plan = plan
        self._coefficient = kind.balancing.coefficient
        self._balancer = Balancer(self.model, kind.balancing, TOP_K)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._texts = [torch.from_numpy(ids) for ids in data.train.values()]

    def step(self) -> None:
        """One step of the optimiser."""
        plan = self._plan
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate * plan.rate(len(self.losses))
        ids = self._batch()
        output = self.model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = self.model.lm_head(output.last_hidden_state[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        aux = self._balancer.loss(output.router_logits, plan.batch_size)
        self._optimizer.zero_grad(set_to_none=True)
        (loss + self._coefficient * aux).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._balancer.update_biases()
        self.losses.append(loss.item())
        self.aux_losses.append(aux.item())

    def save(self, path: Path, key: str) -> None:
        """Writes a checkpoint; an interruption leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "key": key,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "losses": self.losses,
            "aux_losses": self.aux_losses,
            "random": torch.get_rng_state(),
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path, key: str) -> None:
        """Takes up a checkpoint of the very same training, if there is one."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["key"] != key:
            return
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses, self.aux_losses = state["losses"], state["aux_losses"]
        torch.set_rng_state(state["random"])

    def _batch(self) -> torch.Tensor:
        """Windows at random places, one text after the other [B, T]."""
        length = self._plan.sequence_length
        rows = []
        for row in range(self._plan.batch_size):
            text = self._texts[row % len(self._texts)]
            start = int(torch.randint(0, len(text) - length + 1, ()))
            rows.append(text[start : start + length])
        return torch.stack(rows)


def _key(kind: Species, data: Data, plan: Plan, seed: int) -> str:
    parts = [asdict(kind), data.sha256, asdict(plan), seed, software_versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
