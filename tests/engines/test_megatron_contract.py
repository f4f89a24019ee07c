"""The names that are relied on of Megatron-Core, looked up in the sources of each release in the table.

Read from wheels as they are published, without importing them: for one release there is no interpreter
here, and none of the classes can be made without a GPU.
"""

from __future__ import annotations

import ast

import pytest

from contracts import attributes_of, calls_in, class_in, line_in, methods_of
from dodoco_ext.integrations import megatron_symbols as symbols
from dodoco_ext.integrations.megatron_symbols import CHECKED, EXECUTED, SYMBOLS
from dodoco_ext.integrations.symbols import Symbol
from megatron_wheels import tree_of

pytestmark = pytest.mark.engine

CONFIG = (
    "num_layers",
    "num_moe_experts",
    "moe_router_topk",
    "moe_router_fusion",
    "moe_pad_expert_input_to_capacity",
    "mtp_num_layers",
)


def class_of(release: str, file: str, name: str) -> ast.ClassDef:
    return class_in(tree_of(release, file), name)


def line_of(release: str, symbol: Symbol) -> list[ast.ClassDef]:
    return line_in(tree_of(release, symbol.file), symbol.name)


PAIRS = [
    pytest.param(release, symbol, id=f"{release}-{symbol.name}")
    for release in CHECKED
    for symbol in SYMBOLS
    if release != EXECUTED or symbol not in symbols.NOT_IN_EXECUTED
]


@pytest.mark.parametrize(("release", "symbol"), PAIRS)
def test_methods_take_what_is_relied_on(release: str, symbol: Symbol) -> None:
    methods = methods_of(line_of(release, symbol))
    for name, parameters in symbol.methods:
        taken = [argument.arg for argument in methods[name].args.args]
        assert taken[: len(parameters) + 1] == ["self", *parameters], name


@pytest.mark.parametrize(("release", "symbol"), PAIRS)
def test_objects_have_the_attributes_that_are_read(release: str, symbol: Symbol) -> None:
    missing = set(symbol.attributes) - attributes_of(line_of(release, symbol))
    assert not missing


@pytest.mark.parametrize("release", CHECKED)
def test_layers_look_their_dispatchers_methods_up_when_they_call_them(release: str) -> None:
    layer = methods_of([class_of(release, symbols.LAYER.file, "MoELayer")])
    assert "self.token_dispatcher.token_dispatch" in calls_in(layer["dispatch"])
    assert "self.token_dispatcher.token_combine" in calls_in(layer["combine"])
    assert any("self.router" in ast.unparse(node) for node in ast.walk(layer["route"]))


@pytest.mark.parametrize("release", CHECKED)
def test_preprocess_is_called_on_the_object_and_moved_to_the_host_after(release: str) -> None:
    methods = methods_of([class_of(release, symbols.ALLTOALL.file, symbols.ALLTOALL.name)])
    calls = calls_in(methods["dispatch_preprocess"])
    assert calls.index("self.preprocess") < calls.index("self._maybe_dtoh_and_synchronize")
    assert "maybe_move_tensor_to_cpu" not in calls_in(methods["preprocess"])


@pytest.mark.parametrize("release", CHECKED)
def test_an_alltoall_is_one_autograd_function(release: str) -> None:
    cls = class_of(release, "tensor_parallel/mappings.py", "_AllToAll")
    assert ast.unparse(cls.bases[0]) == "torch.autograd.Function"
    methods = methods_of([class_of(release, symbols.ALLTOALL.file, symbols.ALLTOALL.name)])
    assert calls_in(methods["token_dispatch"]).count("all_to_all") == 2  # tokens, probabilities
    assert calls_in(methods["token_combine"]).count("all_to_all") == 1


@pytest.mark.parametrize("release", CHECKED)
def test_the_configuration_has_the_fields_that_are_read(release: str) -> None:
    fields = {
        node.target.id
        for file, name in (
            ("transformer/transformer_config.py", "TransformerConfig"),
            ("model_parallel_config.py", "ModelParallelConfig"),
        )
        for node in class_of(release, file, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert not set(CONFIG) - fields


@pytest.mark.parametrize("release", CHECKED)
def test_schedules_leave_the_micro_batch_at_transformer_layers(release: str) -> None:
    home = {EXECUTED: "pipeline_parallel/schedules.py"}.get(release, "transformer/cuda_graphs.py")
    setters = [
        ast.unparse(node)
        for node in tree_of(release, home).body
        if isinstance(node, ast.FunctionDef) and node.name == "set_current_microbatch"
    ]
    assert "layer.current_microbatch = microbatch_id" in setters[0]
