"""What `find_routers` sees in models not as transformers builds them, and what it refuses."""

from __future__ import annotations

import functools
import re
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.mxfp4 import Mxfp4GptOssMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import families
from dodoco_ext.integrations import transformers_extract as extract
from dodoco_ext.integrations.transformers import Discovery, find_routers

TOKENS, EXPERTS, TOP_K = 6, 8, 2


def qwen() -> torch.nn.Module:
    return families.build("qwen3_moe")[0]


def names(found: Discovery) -> list[str]:
    return [router.name for router in found.routers]


class Experts(torch.nn.Module):
    """The calling convention of transformers' experts, without their weights."""

    def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden


class Block(torch.nn.Module):
    """A block of nobody's registry."""

    def __init__(self, experts: torch.nn.Module | None = None, **numbers: int) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, EXPERTS)
        self.experts = Experts() if experts is None else experts
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, hidden: Any) -> Any:
        weights, ids = self.gate(hidden).topk(self.top_k)
        return self.experts(hidden, ids, weights)


class KeywordBlock(Block):
    """A block that hands the ids over by keyword."""

    def forward(self, hidden: Any) -> Any:
        weights, ids = self.gate(hidden).topk(self.top_k)
        return self.experts(hidden, top_k_index=ids, top_k_weights=weights)


def test_a_dense_model_has_neither_routers_nor_uncovered_blocks() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2)
    assert find_routers(LlamaForCausalLM(config)) == Discovery((), ())


def test_blocks_in_a_plain_module_are_found_through_the_file_that_defines_them() -> None:
    config = qwen().config
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), Qwen3MoeSparseMoeBlock(config))
    (router,) = find_routers(model).routers
    assert (router.name, router.hook, router.form) == ("1.gate", "forward", "ids")
    assert (router.num_experts, router.top_k) == (EXPERTS, TOP_K)


def test_a_router_by_itself_has_a_name() -> None:
    gate = qwen().model.layers[0].mlp.gate
    (router,) = find_routers(gate).routers
    assert router.name == "Qwen3MoeTopKRouter"
    assert router.module is gate


def test_layers_are_in_order_and_share_one_extractor() -> None:
    found = find_routers(qwen())
    assert names(found) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert len({router.extract for router in found.routers}) == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx", "doge"])
def test_compilation_and_checkpointing_wrappers_are_seen_through(family: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = families.build(family)[0]
    bare = find_routers(model)
    layers = model.transformer.blocks if family == "dbrx" else model.model.layers
    layers[0] = torch.compile(layers[0])
    layers[1] = checkpoint_wrapper(layers[1])
    assert find_routers(torch.compile(model)) == bare


def test_a_model_on_the_meta_device_is_read_alike() -> None:
    config = qwen().config
    with torch.device("meta"):
        model = type(qwen())(config)
    found = find_routers(model)
    assert names(found) == names(find_routers(qwen()))
    assert {(router.num_experts, router.top_k) for router in found.routers} == {(EXPERTS, TOP_K)}


def test_an_unregistered_block_is_observed_at_its_experts() -> None:
    model = torch.nn.Sequential(Block(num_experts=EXPERTS, top_k=TOP_K))
    (router,) = find_routers(model).routers
    assert (router.name, router.hook, router.form) == ("0.experts", "forward_pre", "ids")
    assert (router.num_experts, router.top_k) == (EXPERTS, TOP_K)


def test_an_unknown_top_k_is_zero() -> None:
    (router,) = find_routers(torch.nn.Sequential(Block(num_experts=EXPERTS))).routers
    assert router.top_k == 0


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (KeywordBlock(num_experts=EXPERTS, top_k=TOP_K), "by keyword"),
        (Block(top_k=TOP_K), "without telling how many"),
        (Block(torch.nn.ModuleList([torch.nn.Linear(4, 4)]), num_experts=1), "one by one"),
        (Block(torch.nn.Linear(4, 4), num_experts=1), r"takes \(input\), not expert ids"),
    ],
    ids=["keyword", "no-number", "module-list", "no-ids"],
)
def test_a_block_without_ids_is_uncovered_with_the_reason(
    block: torch.nn.Module, reason: str
) -> None:
    found = find_routers(torch.nn.Sequential(block))
    assert not found.routers
    (uncovered,) = found.uncovered
    assert uncovered.name == "0"
    assert re.search(reason, uncovered.reason)


def test_a_block_whose_forward_was_replaced_is_uncovered() -> None:
    model = qwen()
    block = model.model.layers[0].mlp
    block.forward = MethodType(lambda self, hidden: hidden, block)
    found = find_routers(model)
    assert names(found) == ["model.layers.1.mlp.gate"]
    (uncovered,) = found.uncovered
    assert uncovered.name == "model.layers.0.mlp.gate"
    assert "was replaced" in uncovered.reason


def test_a_block_whose_forward_is_only_wrapped_is_observed() -> None:
    model = qwen()
    block = model.model.layers[0].mlp
    original = block.forward
    block.forward = functools.wraps(original)(lambda *args: original(*args))
    assert len(find_routers(model).routers) == 2


def test_a_router_whose_forward_was_replaced_is_observed_at_the_experts() -> None:
    model = qwen()
    gate = model.model.layers[0].mlp.gate
    gate.forward = MethodType(lambda self, hidden: None, gate)
    assert names(find_routers(model)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.gate"]


def test_mxfp4_blocks_route_without_their_router() -> None:
    model = families.build("gpt_oss")[0]
    layer = model.model.layers[0]
    layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, layer.mlp.experts)
    found = find_routers(model)
    assert names(found) == ["model.layers.1.mlp.router"]
    assert "dequantize=True" in found.uncovered[0].reason


def test_where_the_ids_are_is_proved_by_the_source_or_not_at_all() -> None:
    class Second(torch.nn.Module):
        def forward(self, hidden: Any) -> Any:
            router_scores = router_indices = hidden
            return router_scores, router_indices

    class Ambiguous(torch.nn.Module):
        def forward(self, hidden: Any) -> Any:
            router_indices = hidden
            if hidden is None:
                return router_indices, hidden
            return hidden, router_indices

    kind = extract.kind_of(Second)
    assert kind is not None
    assert kind.extract is extract.ids_at_1
    assert extract.kind_of(Ambiguous) is None
    assert extract.kind_of(torch.nn.Linear) is None


class Numbers(torch.nn.Module):
    """The attributes that extractors read off a router."""

    top_k = TOP_K
    num_router_classes = EXPERTS + 1


@pytest.mark.parametrize(
    "function",
    [kind.extract for kind in extract.KINDS.values()]
    + [extract.ids_at_1, extract.ids_at_2, extract.experts_argument],
    ids=lambda function: function.__name__,
)
def test_extractors_are_traced_without_a_break(function: extract.Extract) -> None:
    module = Numbers()
    ids = torch.randint(0, EXPERTS, (TOKENS, TOP_K))
    dense = torch.rand(TOKENS, EXPERTS)
    output = {
        extract.ids_at_1: (dense, ids),
        extract.ids_at_2: (dense, dense, ids),
        extract.zaya_ids: (dense, torch.tensor([[0.0, 1.0]] * TOKENS), ids),
        extract.jetmoe_ids: (None, None, None, None, dense),
    }.get(function, (dense * (dense > 0.5), dense * (dense > 0.5), dense))
    args = (ids, ids)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    expected = function(module, args, output)
    torch.testing.assert_close(compiled(module, args, output), expected)
    assert expected.dtype in (torch.bool, torch.int64)
