"""The names of Megatron-Core that are relied on. Megatron itself is never imported.

Tests check every one of them against the sources of the releases named here, and the classes are found by
name, so that a model of any release that keeps these names is observed.
"""

from __future__ import annotations

from dodoco_ext.integrations.symbols import Symbol

EXECUTED = "0.16.1"
"""The release that tests run."""

CHECKED = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.2")
"""Releases whose sources are checked for the names below."""

_DISPATCHERS = "transformer/moe/token_dispatcher.py"

LAYER = Symbol(
    "transformer/moe/moe_layer.py",
    "BaseMoELayer",
    (("set_layer_number", ("layer_number",)),),
    ("router", "token_dispatcher", "layer_number", "config"),
)
ROUTER = Symbol(
    "transformer/moe/router.py",
    "TopKRouter",
    (("forward", ("input", "padding_mask")),),
    ("topk",),
)
INFERENCE_ROUTER = Symbol(
    "transformer/moe/router.py", "InferenceTopKRouter", (("forward", ("input", "padding_mask")),)
)
DISPATCHER = Symbol(
    _DISPATCHERS, "MoETokenDispatcher", (), ("ep_group", "tp_ep_group", "tp_size", "ep_size")
)
ALLTOALL = Symbol(
    _DISPATCHERS,
    "MoEAlltoAllTokenDispatcher",
    (
        ("preprocess", ("routing_map",)),
        ("token_dispatch", ("permutated_local_input_tokens", "permuted_probs")),
        ("token_combine", ("hidden_states",)),
    ),
    ("input_splits", "output_splits", "tokens_per_expert"),
)
ALLGATHER = Symbol(
    _DISPATCHERS,
    "MoEAllGatherTokenDispatcher",
    (
        ("token_dispatch", ("hidden_states", "probs")),
        ("token_combine", ("hidden_states",)),
    ),
    ("routing_map",),
)
FLEX = Symbol(
    _DISPATCHERS,
    "MoEFlexTokenDispatcher",
    (
        ("token_dispatch", ("hidden_states", "probs")),
        ("token_combine", ("hidden_states",)),
    ),
    ("_comm_manager",),
)
DEEPEP = Symbol(_DISPATCHERS, "_DeepepManager", (), ("handle", "token_probs"))

SYMBOLS = (LAYER, ROUTER, INFERENCE_ROUTER, DISPATCHER, ALLTOALL, ALLGATHER, FLEX, DEEPEP)
NOT_IN_EXECUTED = (INFERENCE_ROUTER,)


def is_a(thing: object, symbol: Symbol) -> bool:
    """Whether an object is of a class of that name, or of one derived from it."""
    return any(cls.__name__ == symbol.name for cls in type(thing).__mro__)
