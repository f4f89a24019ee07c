"""How much slower a small model runs while it is recorded: decode and prefill, in CPU time.

Qwen3-MoE's architecture with four layers and 4 million weights: production models do more work a
layer, and are slowed by less. The weights are random: what a layer costs does not depend on them,
and a model fresh from initialisation routes to all experts, as a trained one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext.attachment import _make_probe
from dodoco_ext.integrations.transformers import find_routers

from .figures import TOLERANCE, Figures, in_us, with_interval
from .interleave import Contestant, Summary, interleave

LIMIT = 0.01
CONTEXT = 128  # tokens in the cache before a decoding step, or in a sequence of prefill


NUM_LAYERS = 4


class Model:
    """The model and its probes, which come and go without a trace."""

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.Qwen3MoeConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=64,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=0,
            experts_implementation="grouped_mm",
        )
        torch.manual_seed(0)
        self.model = transformers.Qwen3MoeForCausalLM(config).eval()
        self.vocab_size = config.vocab_size
        self._routers = find_routers(self.model).routers
        self.attachment = dodoco.attach(self.model)
        assert len(self._routers) == NUM_LAYERS
        self._probes = [router.module.__dict__["forward"] for router in self._routers]

    def _probe(self) -> None:
        self.bare()
        for router, probe in zip(self._routers, self._probes, strict=True):
            router.module.__dict__["forward"] = probe

    def bare(self) -> None:
        for router in self._routers:
            router.module.__dict__.pop("forward", None)
            router.module._forward_hooks.clear()

    def empty_hook(self) -> None:
        self.bare()
        for router in self._routers:
            router.module._forward_hooks[0] = lambda module, args, output: None

    def disabled(self) -> None:
        self._probe()
        self.attachment.enabled = False

    def recording(self) -> None:
        self._probe()
        self.attachment.enabled = True

    def time_probes(self, run: Callable[[], object], num_passes: int) -> Summary:
        """Wall seconds of one probe where it runs: between the model's layers, caches cold."""
        seconds: list[float] = []

        def timed(probe: Callable[..., None]) -> Callable[..., None]:
            def hook(*arguments: Any) -> None:
                start = time.perf_counter_ns()
                probe(*arguments)
                seconds.append((time.perf_counter_ns() - start) / 1e9)

            return hook

        self.bare()
        self.attachment.enabled = True
        handles = [
            router.module.register_forward_hook(timed(_make_probe(router.extract, router.form)))
            for router in self._routers
        ]
        run()
        seconds.clear()
        for _ in range(num_passes):
            run()
        for handle in handles:
            handle.remove()
        return Summary.of(np.array(seconds))

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (batch, length), generator=generator)

    def decoder(self, batch: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """One step of decoding behind `CONTEXT` tokens, and what makes room for it again."""
        prompt, last = self.tokens(batch, CONTEXT), self.tokens(batch, 1)
        self.bare()
        with torch.inference_mode():
            cache: Any = self.model(prompt, use_cache=True).past_key_values

        def step() -> object:
            with torch.inference_mode():
                return self.model(last, past_key_values=cache, use_cache=True).logits

        def rewind() -> None:
            surplus = cache.get_seq_length() - CONTEXT
            if surplus > 0:
                with torch.inference_mode():
                    cache.crop(-surplus)

        return step, rewind

    def prefiller(self, batch: int) -> Callable[[], object]:
        prompt = self.tokens(batch, CONTEXT)

        def prefill() -> object:
            with torch.inference_mode():
                return self.model(prompt, use_cache=True, logits_to_keep=1).logits

        return prefill


@pytest.fixture
def model(recordings: object) -> Iterator[Model]:
    made = Model()
    yield made
    made.attachment.detach()


@pytest.mark.parametrize(
    ("phase", "batch", "num_blocks"),
    [("decode", 8, 700), ("decode", 32, 350), ("prefill", 8, 240)],
)
def test_recording_slows_the_model_by_less_than_one_per_cent(
    figures: Figures, model: Model, phase: str, batch: int, num_blocks: int
) -> None:
    rewind: Callable[[], None] | None = None
    if phase == "decode":
        run, rewind = model.decoder(batch)
    else:
        run = model.prefiller(batch)

    def prepare(switch: Callable[[], None]) -> Callable[[], None]:
        def switch_and_rewind() -> None:
            switch()
            if rewind is not None:
                rewind()

        return switch_and_rewind

    # The same twice: what the second bare run differs by is the error of the method here and now.
    ways = {
        "bare": model.bare,
        "empty hook": model.empty_hook,
        "disabled": model.disabled,
        "recording": model.recording,
        "bare again": model.bare,
    }
    run()
    timings = interleave(
        {way: Contestant(run, prepare(switch)) for way, switch in ways.items()},
        num_blocks=figures.blocks(num_blocks),
        # Several steps on end, as a serving model takes them; prefill is long enough by itself.
        calls=dict.fromkeys(ways, 4 if rewind is not None else 1),
    )
    name = f"{phase}, batch {batch}"
    cost = {way: figures.add(f"model/{name}/{way}", timings.time(way)) for way in ways}
    slowdown = {way: timings.slowdown(way, "bare") for way in ways if way != "bare"}
    layers = len(model.attachment.layers)
    if rewind is not None:
        rewind()
    probe = figures.add(f"model/{name}/probe in place", model.time_probes(run, 30))
    figures.table(
        f"A small model ({layers} layers), one pass, CPU time; slower than bare by",
        ("phase", "bare, us", "a probe in place, us", *slowdown),
    ).rows.append(
        (
            f"{phase}, {batch} x {1 if phase == 'decode' else CONTEXT}",
            in_us(cost["bare"].p50),
            " / ".join(in_us(value) for value in (probe.p20, probe.p50, probe.p80)),
            *(with_interval(slowdown[way], 100, " %") for way in slowdown),
        )
    )
    for way, slower in slowdown.items():
        figures.add(f"model/{name}/slowdown {way}", slower)
    figures.judge(f"model/{name}/slowdown recording", slowdown["recording"], LIMIT, slack=TOLERANCE)
