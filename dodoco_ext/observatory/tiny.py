"""The demo's model: a small GQA mixture of experts, trained in about a minute on the built-in corpora."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dodoco_ext.observatory.conditions import encode
from dodoco_ext.observatory.corpus import Corpus
from dodoco_ext.observatory.models import quiet
from dodoco_ext.observatory.tokenizer import train_tokenizer, unigram_loss

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""

_RECORD = "training.json"


@dataclass(frozen=True)
class TinyConfig:
    """Size and training of the demo's model; everything that decides its weights but seed and data.

    Attributes:
        vocab_size: Tokens of the BPE vocabulary.
        hidden_size, num_layers, num_heads, num_kv_heads: As in transformers' configuration.
        num_experts, top_k, expert_size: Experts a layer, experts a token, width of one expert.
        batch_size, sequence_length, num_steps: Sequences a step, tokens a sequence, steps.
        learning_rate: Peak of a cosine schedule with linear warm-up.
        aux_loss_coef: Weight of the load-balancing loss.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    num_experts: int = 64
    top_k: int = 4
    expert_size: int = 32
    batch_size: int = 16
    sequence_length: int = 128
    num_steps: int = 240
    learning_rate: float = 3e-3
    aux_loss_coef: float = 0.01


@dataclass(frozen=True)
class Training:
    """How the model came to be.

    Attributes:
        key: Digest of configuration, seed, data and versions: the name of these weights.
        num_parameters: Weights, the tied embedding counted once.
        num_steps, num_tokens: Optimiser steps, and tokens they read.
        first_loss, last_loss: Training cross-entropy at both ends (means of up to 10 steps), nats a token.
        aux_loss: Load-balancing loss of the last steps; 1 is perfect balance, E / k collapse.
        unigram_loss: Held-out cross-entropy of add-one unigram frequencies of the training text,
            by corpus, nats a token: what a model that learned no context would get.
        seconds, cpu_seconds: Wall and CPU time of the optimiser steps.
        versions: Packages that took part.
    """

    key: str
    num_parameters: int
    num_steps: int
    num_tokens: int
    first_loss: float
    last_loss: float
    aux_loss: float
    unigram_loss: dict[str, float]
    seconds: float
    cpu_seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class TinyModel:
    """A trained model with its tokenizer, and whether it was found trained already."""

    model: Any
    tokenizer: Any
    training: Training
    reused: bool


def train_or_reuse(
    folder: Path,
    corpora: dict[str, Corpus],
    config: TinyConfig,
    seed: int,
    *,
    retrain: bool = False,
    progress: Progress | None = None,
) -> TinyModel:
    """The model for this configuration, seed, data and software: from `folder`, or trained and saved there.

    Args:
        folder: Where the model is kept, in transformers' own format; `dodoco observe --model` reads it.
        corpora: What to train on, all in equal parts.
        config: Size and training.
        seed: Seed of initial weights, of the order of the data and of nothing else.
        retrain: Train even if a fitting model is there.
        progress: Told after each step.
    """
    key = _key(config, seed, corpora)
    if not retrain and (training := _read_record(folder)) is not None and training.key == key:
        from transformers import AutoTokenizer

        with quiet():
            model = _model_class().from_pretrained(folder, experts_implementation="grouped_mm")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return TinyModel(model.eval(), tokenizer, training, reused=True)
    tokenizer = train_tokenizer(corpora, config.vocab_size)
    model, training = train(tokenizer, corpora, config, seed, key=key, progress=progress)
    if folder.exists():
        shutil.rmtree(folder)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Last: a folder without the record is an unfinished save, and trained anew.
    (folder / _RECORD).write_text(json.dumps(asdict(training), indent=1))
    return TinyModel(model, tokenizer, training, reused=False)


def train(
    tokenizer: Any,
    corpora: dict[str, Corpus],
    config: TinyConfig,
    seed: int,
    *,
    key: str = "",
    progress: Progress | None = None,
) -> tuple[Any, Training]:
    """Trains a model from nothing; the caller's random state is left as it was.

    Returns:
        The model, in evaluation mode, and the record of its training.
    """
    streams = {
        name: encode(tokenizer, [document.text for document in corpus.train])
        for name, corpus in corpora.items()
    }
    baselines = {
        name: unigram_loss(tokenizer, list(streams.values()), corpus.held_out)
        for name, corpus in corpora.items()
    }
    texts = [torch.from_numpy(stream) for stream in streams.values()]
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = _model_class()(_transformers_config(config, len(tokenizer)))
        model.train()
        started, started_cpu = time.perf_counter(), time.process_time()
        losses = []
        for step, loss_and_aux in enumerate(_steps(model, texts, config), start=1):
            losses.append(loss_and_aux)
            if progress is not None:
                progress(step, config.num_steps)
    window = min(10, len(losses))
    record = Training(
        key=key,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_steps=config.num_steps,
        num_tokens=config.num_steps * config.batch_size * config.sequence_length,
        first_loss=float(np.mean([loss for loss, _ in losses[:window]])),
        last_loss=float(np.mean([loss for loss, _ in losses[-window:]])),
        aux_loss=float(np.mean([aux for _, aux in losses[-window:]])),
        unigram_loss=baselines,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - started_cpu,
        versions=software_versions(),
    )
    return model.eval(), record


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balancing loss of one layer: E sum_e f_e p_e, 1 when balanced.

    Equations 4 to 6 of Fedus et al., "Switch Transformers" (2021), with f_e the share of the
    assignments that expert e got and p_e its mean router probability.

    Args:
        router_logits: [tokens, E].
        top_k: Experts a token.
    """
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    num_experts = router_logits.shape[-1]
    share = torch.bincount(chosen, minlength=num_experts).float() / chosen.numel()
    return num_experts * (share * probabilities.mean(dim=0)).sum()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, and restores the number of threads.

    With several, the backward of an index is a race whose sums differ from run to run, and the
    result depends on the number of cores. At this size a second thread gains little, and where
    something else uses the cores, threads that wait for each other lose a great deal.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def software_versions() -> dict[str, str]:
    """Versions that can change the weights."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _steps(
    model: Any, streams: list[torch.Tensor], config: TinyConfig
) -> Iterator[tuple[float, float]]:
    """Optimises step by step, yielding cross-entropy and balance loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warmup = max(1, config.num_steps // 12)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
        return min((step + 1) / warmup, 0.05 + 0.95 * cosine)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(config.num_steps):
        ids = _batch(streams, config.batch_size, config.sequence_length)
        output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        # transformers' own auxiliary loss pools all layers, so one layer's idle experts hide behind
        # another's: every layer is balanced by itself here.
        layers = [balance_loss(logits_, config.top_k) for logits_ in output.router_logits]
        aux = torch.stack(layers).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + config.top_k * config.aux_loss_coef * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield loss.item(), aux.item()


def _batch(streams: list[torch.Tensor], batch_size: int, length: int) -> torch.Tensor:
    rows = []
    for row in range(batch_size):
        stream = streams[row % len(streams)]
        start = int(torch.randint(0, len(stream) - length + 1, ()))
        rows.append(stream[start : start + length])
    return torch.stack(rows)


def _model_class() -> Any:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM


def _transformers_config(config: TinyConfig, vocab_size: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_size,
        norm_topk_prob=True,
        router_aux_loss_coef=config.aux_loss_coef,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        experts_implementation="grouped_mm",
    )


def _key(config: TinyConfig, seed: int, corpora: dict[str, Corpus]) -> str:
    data = {name: corpus.sha256 for name, corpus in corpora.items()}
    parts = [asdict(config), seed, data, software_versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path) -> Training | None:
    try:
        return Training(**json.loads((folder / _RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # no model yet, or one written by another version: train
