"""How a router's choice is read off a module's call: one extractor per kind, shared by all layers.

Every extractor has the signature ``extract(module, args, output) -> Tensor`` and returns either
ids ``[..., top_k]`` (integers, expert numbers) or a routing map ``[..., num_experts]`` (bool, true
where the token is routed to the expert). They are module-level functions without data access, so
that ``torch.compile(fullgraph=True)`` traces them, and one function object serves every layer of a
kind, so that dynamo's guards on the hook are the same for all of them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Extract = Callable[[torch.nn.Module, tuple[Any, ...], Any], torch.Tensor]
Form = Literal["ids", "map", "auto"]
Hook = Literal["forward", "forward_pre"]

IDS_NAMES = frozenset(
    {
        "top_k_index",
        "top_k_indices",
        "topk_index",
        "topk_indices",
        "topk_ids",
        "topk_idx",
        "selected_experts",
        "router_indices",
        "routing_indices",
        "expert_indices",
        "indices",
    }
)
"""Variable and parameter names under which transformers' code carries the chosen experts' ids."""


def ids_at_1(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[..., top_k]``: second element of the router's output."""
    ids: torch.Tensor = output[1]
    return ids


def ids_at_2(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[..., top_k]``: third element of the router's output (logits, weights, ids)."""
    ids: torch.Tensor = output[2]
    return ids


def experts_argument(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[..., top_k]``: second argument of the experts module (hidden states, ids, weights)."""
    ids: torch.Tensor = args[1]
    return ids


def embedding_argument(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[tokens, top_k]``: the indices with which Doge looks its one-row experts up."""
    ids: torch.Tensor = args[0]
    return ids


def zaya_ids(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[tokens, top_k]`` in which skipping is class ``num_experts``.

    Zaya's router rewrites the skip class to expert 0 with weight exactly 0 before it returns; taken
    as it stands, every skipped token would count as one of expert 0.
    """
    ids: torch.Tensor = output[2]
    return ids.masked_fill(output[1] == 0, module.num_router_classes - 1)  # type: ignore[operator]


def jetmoe_ids(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Ids ``[tokens, top_k]``: the top-k again, for JetMoe returns it only sorted by expert."""
    logits: torch.Tensor = output[4]
    return logits.topk(module.top_k, dim=1).indices  # type: ignore[arg-type]


def llama4_map(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Map ``[tokens, num_experts]``: a score outside the top-k is exactly 0 (sigmoid of -inf)."""
    scores: torch.Tensor = output[0]
    return scores != 0


def switch_map(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Map ``[batch, sequence, num_experts]``: the one-hot dispatch mask, cleared over capacity."""
    mask: torch.Tensor = output[0]
    return mask != 0


def nllb_map(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """Map ``[tokens, num_experts]``: the weights of both choices, 0 for those over capacity."""
    gates: torch.Tensor = output[1]
    return gates != 0


@dataclass(frozen=True, slots=True)
class Kind:
    """How the routers of one class are observed.

    Attributes:
        extract: Reads ids or a map off the call.
        hook: Where it hangs.
        form: What ``extract`` returns.
        child: Name of the router's submodule that carries the hook ("" for the router itself).
        num_experts: Attribute with the number of classes the router chooses among.
        top_k: Attribute with the choices per token, or the number itself where the class fixes it.
    """

    extract: Extract
    hook: Hook = "forward"
    form: Form = "ids"
    child: str = ""
    num_experts: str = "num_experts"
    top_k: str | int = "top_k"


KINDS: dict[str, Kind] = {
    "DogeCDMoE": Kind(embedding_argument, hook="forward_pre", child="down_embed"),
    "JetMoeTopKGating": Kind(jetmoe_ids),
    "Llama4Router": Kind(llama4_map, form="map"),
    # Zero (identity) experts are choices like any other, numbered after the real ones.
    "LongcatFlashTopkRouter": Kind(ids_at_2, num_experts="n_routed_experts"),
    "NllbMoeTop2Router": Kind(nllb_map, form="map", top_k=2),
    "SwitchTransformersTop1Router": Kind(switch_map, form="map", top_k=1),
    "ZayaRouter": Kind(zaya_ids, num_experts="num_router_classes"),
}
"""Router classes whose output is not (logits, weights, ids) over ``num_experts``, by class name."""

# These replace `forward` on the instance by a closure that calls the original.
_TRANSPARENT_REPLACEMENTS = ("transformers.distributed.", "accelerate.")

_IDS_AT: dict[int, Extract] = {1: ids_at_1, 2: ids_at_2}


def kind_of(router_class: type[torch.nn.Module]) -> Kind | None:
    """The kind of a router class: from the table of odd ones, else proved by its own source.

    Args:
        router_class: Class of a module that transformers' registry names as a router.

    Returns:
        None where neither the table nor the source tells where the ids are.
    """
    for cls in router_class.__mro__:
        if cls.__name__ in KINDS:
            return KINDS[cls.__name__]
    position = _returned_ids_position(router_class)
    return Kind(_IDS_AT[position]) if position in _IDS_AT else None


_sources: dict[object, tuple[ast.AST, ...]] = {}


def _source(definition: Any) -> tuple[ast.AST, ...]:
    """All syntax nodes of a class or function, read once; none where the source is not at hand."""
    if definition not in _sources:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(definition)))
        except (OSError, TypeError, SyntaxError):
            _sources[definition] = ()
        else:
            _sources[definition] = tuple(ast.walk(tree))
    return _sources[definition]


def _returned_ids_position(router_class: type[torch.nn.Module]) -> int | None:
    """Where in the returned tuple the ids are, if every return of ``forward`` says the same."""
    nodes = _source(router_class.forward)
    positions = {_ids_element(node.value) for node in nodes if isinstance(node, ast.Return)}
    return positions.pop() if len(positions) == 1 else None


def _ids_element(returned: ast.expr | None) -> int | None:
    """Index of the only element of a tuple display that mentions ids by name."""
    if not isinstance(returned, ast.Tuple):
        return None
    hits = [
        index
        for index, element in enumerate(returned.elts)
        if any(isinstance(node, ast.Name) and node.id in IDS_NAMES for node in ast.walk(element))
    ]
    return hits[0] if len(hits) == 1 else None


def takes_ids(experts: torch.nn.Module) -> bool:
    """Whether an experts module is called with (hidden states, ids, weights), by parameter names.

    Weights are asked for too: experts without them are assigned by the caller, not routed.
    """
    try:
        parameters = list(inspect.signature(type(experts).forward).parameters)
    except (TypeError, ValueError):
        return False
    return len(parameters) > 3 and parameters[2] in IDS_NAMES


def passes_ids_by_keyword(block_class: type[torch.nn.Module]) -> bool:
    """Whether a block hands its experts the ids by keyword, out of a pre-hook's sight."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "experts"
        and any(keyword.arg in IDS_NAMES for keyword in node.keywords)
        for node in _source(block_class)
    )


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether `forward` was replaced on the instance by other than a wrapper around it."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    original = inspect.unwrap(forward)
    if getattr(original, "__func__", original) is type(module).forward:
        return False
    return not str(getattr(forward, "__module__", "")).startswith(_TRANSPARENT_REPLACEMENTS)
