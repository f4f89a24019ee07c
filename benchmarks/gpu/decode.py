"""A transformers MoE in Qwen3-30B-A3B's shapes that decodes in CUDA graphs: bare, disabled, recording.

The weights are random and as many layers are made as fit; what a layer costs depends on neither. Bare and
recording are graphs of one model, captured before and after `attach()`, and replayed in turn. A second
graph of the bare model shows the error of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dodoco_ext as dodoco

from .device_timing import capture, interleave_graphs
from .place import Place, find_place, recordings_in_memory
from .results import Results

SHAPES = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
DRY_SHAPES = SHAPES | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
MAX_LAYERS = 48
BATCHES, DRY_BATCHES = (1, 32, 128), (1, 4)
CONTEXT = 512  # tokens in the cache
RESERVED_BYTES = 12 << 30  # for caches, graphs and activations
ROUNDS, REPLAYS = 80, 4
EXPERTS_BY = ("grouped_mm", "batched_mm")


class FixedCache:
    """Keys and values of `CONTEXT` tokens; every step writes the last position and reads them all.

    What transformers asks of a cache in a forward pass with positions and mask given: `update`.
    """

    def __init__(
        self, config: Any, batch: int, context: int, device: str, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.randn(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.randn(shape, device=device, dtype=dtype) for _ in layers]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: object, **more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of one token; returns those of all."""
        self.keys[layer][:, :, -1:].copy_(keys)
        self.values[layer][:, :, -1:].copy_(values)
        return self.keys[layer], self.values[layer]


@dataclass
class Step:
    """One step of decoding with everything at fixed addresses."""

    model: Any
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    cache: FixedCache
    logits: torch.Tensor | None = None

    def __call__(self) -> None:
        with torch.no_grad():
            self.logits = self.model(
                input_ids=self.tokens,
                position_ids=self.positions,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits


def main(dry: bool, effort: float, results: Results) -> int:
    """Measures the batch sizes that are not measured yet. Returns 1 if a recording was wrong."""
    place = find_place(dry, results)
    if place is None:
        return 0
    try:
        import transformers
    except ImportError as error:
        results.put("not there", f"transformers: {error}")
        return 0
    rounds = max(10, round(ROUNDS * effort))
    wanted = DRY_BATCHES if dry else BATCHES
    batches = [batch for batch in wanted if f"batch {batch}" not in results]
    if batches:
        model = make_model(transformers, place)
        results.put("layers", model.config.num_hidden_layers)
        results.put("shapes", DRY_SHAPES if dry else SHAPES)
        with recordings_in_memory():
            for batch in batches:
                results.put(f"batch {batch}", measure(place, model, batch, rounds))
                place.cuda.empty_cache()  # the next batch needs other sizes
                print(f"batch {batch}", flush=True)
    cells = [results.values[f"batch {batch}"] for batch in wanted]
    results.put(
        "summary",
        f"{results.values['layers']} layers; recording slower by "
        + ", ".join(f"{c['slowdown']['recording']['p50']:.2%}" for c in cells)
        + f" at batch sizes {', '.join(map(str, wanted))}",
    )
    return 0 if all(cell["exact"] for cell in cells) else 1


def make_model(transformers: Any, place: Place) -> Any:
    """The model with as many layers as fit, in bfloat16 (dry: float32)."""
    shapes = DRY_SHAPES if place.dry else SHAPES
    free = place.cuda.mem_get_info()[0] - RESERVED_BYTES
    layers = 3 if place.dry else layers_that_fit(shapes, free)
    if layers < 1:
        raise RuntimeError(f"{free / 2**30:.1f} GiB free: not one layer fits")
    config = transformers.Qwen3MoeConfig(**shapes, num_hidden_layers=layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if place.dry else torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(place.device):
            model = transformers.Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def layers_that_fit(shapes: dict[str, Any], free_bytes: int) -> int:
    """Layers of these shapes in so many bytes, two a weight."""
    hidden, heads = shapes["hidden_size"], shapes["head_dim"]
    experts = shapes["num_experts"] * 3 * hidden * shapes["moe_intermediate_size"]
    queries = shapes["num_attention_heads"] * heads
    attention = hidden * 2 * (queries + shapes["num_key_value_heads"] * heads)
    a_layer = 2 * (experts + attention + hidden * (shapes["num_experts"] + 2) + 2 * heads)
    embeddings = 2 * 2 * shapes["vocab_size"] * hidden
    return min(MAX_LAYERS, (free_bytes - embeddings) // a_layer)


def make_step(place: Place, model: Any, batch: int) -> Step:
    """A step of decoding for a batch."""
    context = 16 if place.dry else CONTEXT
    dtype, device = next(model.parameters()).dtype, place.device
    return Step(
        model,
        torch.zeros(batch, 1, dtype=torch.int64, device=device),
        torch.full((batch, 1), context - 1, dtype=torch.int64, device=device),
        torch.zeros(batch, 1, 1, context, dtype=dtype, device=device),
        FixedCache(model.config, batch, context, device, dtype),
    )


def measure(place: Place, model: Any, batch: int, rounds: int) -> dict[str, Any]:
    """One batch size: seconds a step, slowdowns, and whether what was recorded is exact."""
    cuda, stream, pool = place.cuda, place.cuda.Stream(), place.cuda.graph_pool_handle()
    step = make_step(place, model, batch)
    experts_by = choose_experts(place, model, step, stream)
    graphs = {name: capture(place, step, 1, stream, pool) for name in ("bare", "bare again")}
    attachment = dodoco.attach(model, lanes=2)
    try:
        if attachment.uncovered:
            raise RuntimeError(f"not observed: {attachment.uncovered}")
        with attachment.paused():
            graphs["recording"] = capture(place, step, 1, stream, pool)
        graphs["disabled"] = graphs["recording"]
        before, header = attachment.snapshot(), attachment.reader.header
        draw = _token_drawer(step, place)

        def switch(enabled: bool) -> Callable[[], None]:
            def prepare() -> None:
                attachment.enabled = enabled
                draw()

            return prepare

        # The graph that is timed is replayed once before, disabled.
        attachment.enabled = False
        timings = interleave_graphs(
            place,
            graphs,
            rounds=rounds,
            replays=REPLAYS,
            prepare={
                "bare": draw,
                "bare again": draw,
                "recording": switch(enabled=True),
                "disabled": switch(enabled=False),
            },
        )
        cuda.synchronize()
        counted = (attachment.snapshot() - before).layers
        passes, top_k = rounds * REPLAYS, model.config.num_experts_per_tok
        exact = all(
            layer.passes == passes
            and layer.tokens == passes * batch
            and int(layer.counts.sum()) == passes * batch * top_k
            for layer in counted
        )
        faults = attachment.reader.header["num_faults"] - header["num_faults"]
    finally:
        attachment.detach()
    names = ("bare again", "disabled", "recording")
    over = timings.difference("recording", "bare")
    return {
        "exact": exact and faults == 0 and len(counted) == model.config.num_hidden_layers,
        "experts by": experts_by,
        "seconds": {name: asdict(timings.time(name)) for name in graphs},
        "slowdown": {name: asdict(timings.slowdown(name, "bare")) for name in names},
        "recording over bare": asdict(over),
        "over bare, seconds a layer": over.p50 / model.config.num_hidden_layers,
    }


def choose_experts(place: Place, model: Any, step: Step, stream: Any) -> str:
    """The first way to run experts that a graph can hold on this machine."""
    reasons = []
    for name in EXPERTS_BY:
        model.set_experts_implementation(name)
        try:
            capture(place, step, 1, stream)
        except RuntimeError as error:
            reasons.append(f"{name}: {str(error).partition(chr(10))[0]}")
            continue
        return name
    raise RuntimeError("no way to run experts can be captured: " + "; ".join(reasons))


def _token_drawer(step: Step, place: Place) -> Callable[[], None]:
    """Other tokens for every block: a repeated step would route alike."""
    size = step.model.config.vocab_size
    drawn = torch.randint(0, size, (64, *step.tokens.shape), device=place.device)
    turn = iter(range(1 << 62))

    def draw() -> None:
        step.tokens.copy_(drawn[next(turn) % 64])

    return draw
