"""How engines call DeepEP's Buffer, held against the stand-in that stands for it in the other tests.

DeepEP is no package of PyPI; those who call it are, and their calls name its parameters and what it returns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepep_stand_in as deepep
from contracts import calls_in
from dodoco_ext.integrations import megatron_symbols
from dodoco_ext.vllm_versions import CHECKED as VLLM_CHECKED
from megatron_wheels import tree_of as megatron_tree
from vllm_sources import tree_of as vllm_tree

pytestmark = pytest.mark.engine

METHODS = {*deepep.SIGNATURES, "get_dispatch_layout"}
PREPARE = "model_executor/layers/fused_moe/prepare_finalize"
CALLERS = [
    *[
        ("megatron", release, "transformer/moe/fused_a2a.py", {"dispatch": 2, "combine": 2})
        for release in megatron_symbols.CHECKED
    ],
    *[
        ("vllm", release, f"{PREPARE}/deepep_ht.py", {"dispatch": 1, "combine": 1})
        for release in VLLM_CHECKED
    ],
    *[
        ("vllm", release, f"{PREPARE}/deepep_ll.py", {"low_latency_dispatch": 1})
        for release in VLLM_CHECKED
    ],
]


def calls_of_buffers(tree: ast.Module) -> Iterator[tuple[str, ast.Call, list[str] | None]]:
    """Method, call, and the names that its results are given; None: they are not taken apart."""
    taken = {
        id(node.value): [ast.unparse(each) for each in node.targets[0].elts]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr in METHODS and owner in ("buffer", "self.buffer"):
                yield node.func.attr, node, taken.get(id(node))


@pytest.mark.parametrize(
    ("engine", "release", "file", "expected"),
    [pytest.param(*caller, id=f"{caller[0]}-{caller[1]}-{Path(caller[2]).stem}") for caller in CALLERS],
)  # fmt: skip
def test_the_stand_in_takes_the_calls_of(
    engine: str, release: str, file: str, expected: dict[str, int]
) -> None:
    tree = {"megatron": megatron_tree, "vllm": vllm_tree}[engine](release, file)
    found = [call for call in calls_of_buffers(tree) if call[0] != "get_dispatch_layout"]
    assert {name: sum(call[0] == name for call in found) for name in expected} == expected
    for name, call, results in found:
        parameters = deepep.SIGNATURES[name]
        named = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        assert len(call.args) <= len(parameters)
        assert not named - set(parameters), ast.unparse(call)
        assert results is not None
        assert len(results) == deepep.RESULTS[name], results
        if any(
            each.arg == "async_finish" and ast.unparse(each.value) != "False"
            for each in call.keywords
        ):
            # What is recorded of such a call hangs on this one.
            assert f"{results[-1]}.current_stream_wait" in calls_in(tree)
        if "handle" in results:
            assert results.index("handle") == deepep.HANDLE_AT[name]


@pytest.mark.parametrize(
    ("engine", "release", "file"),
    [pytest.param(*caller[:3], id=f"{caller[0]}-{caller[1]}") for caller in CALLERS if "dispatch" in caller[3]],
)  # fmt: skip
def test_a_layout_begins_with_the_tokens_of_each_rank(engine: str, release: str, file: str) -> None:
    tree = {"megatron": megatron_tree, "vllm": vllm_tree}[engine](release, file)
    layouts = [
        results for name, _, results in calls_of_buffers(tree) if name == "get_dispatch_layout"
    ]
    assert layouts
    for results in layouts:
        assert results is not None
        assert results[0] == "num_tokens_per_rank"
        assert len(results) == deepep.RESULTS["get_dispatch_layout"]
