"""The names that the plugin relies on of vLLM, looked up in the sources of each release in the table.

One release is installed here, another is read from its wheel: it is built for GPUs and runs on none here.
"""

from __future__ import annotations

import ast

import pytest

from contracts import attributes_of, calls_in, class_in, line_in, methods_of
from dodoco_ext.integrations import vllm_symbols as symbols
from dodoco_ext.integrations.symbols import Symbol
from dodoco_ext.integrations.vllm_symbols import SYMBOLS
from dodoco_ext.vllm_versions import CHECKED
from vllm_sources import tree_of

pytestmark = pytest.mark.engine

BOTH = pytest.mark.parametrize("release", CHECKED)
RUNNERS = pytest.mark.parametrize("runner", [symbols.RUNNER_1, symbols.RUNNER_2], ids=["v1", "v2"])
PAIRS = [
    pytest.param(release, symbol, id=f"{release}-{symbol.file}-{symbol.name}")
    for release in CHECKED
    for symbol in SYMBOLS
]
CPU_RUNNER = "v1/worker/cpu_model_runner.py"


def methods(release: str, symbol: Symbol) -> dict[str, ast.FunctionDef]:
    return methods_of(line_in(tree_of(release, symbol.file), symbol.name))


def function_in(release: str, file: str, name: str) -> ast.FunctionDef:
    for node in tree_of(release, file).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    pytest.fail(f"vllm {release} has no function {name} in {file}")


@pytest.mark.parametrize(("release", "symbol"), PAIRS)
def test_methods_take_what_is_relied_on(release: str, symbol: Symbol) -> None:
    found = methods(release, symbol)
    for name, parameters in symbol.methods:
        taken = [argument.arg for argument in found[name].args.args]
        assert taken[: len(parameters) + 1] == ["self", *parameters], name


@pytest.mark.parametrize(("release", "symbol"), PAIRS)
def test_objects_have_the_attributes_that_are_read(release: str, symbol: Symbol) -> None:
    classes = line_in(tree_of(release, symbol.file), symbol.name)
    declared = {
        node.target.id
        for each in classes
        for node in each.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert not set(symbol.attributes) - attributes_of(classes) - declared


@BOTH
def test_plugins_are_loaded_before_a_worker_sets_up_its_device(release: str) -> None:
    assert "load_general_plugins" in calls_in(methods(release, symbols.WORKER)["init_worker"])
    for file, name in (
        ("v1/executor/uniproc_executor.py", "UniProcExecutor"),
        ("v1/executor/multiproc_executor.py", "WorkerProc"),
    ):
        (function,) = [
            method
            for method in methods_of([class_in(tree_of(release, file), name)]).values()
            if any(call.endswith(".init_worker") for call in calls_in(method))
        ]
        called = [call.rpartition(".")[2] for call in calls_in(function)]
        order = [called.index(each) for each in ("init_worker", "init_device", "load_model")]
        assert order == sorted(order), name


@BOTH
def test_the_cpu_runner_is_one_of_the_two(release: str) -> None:
    (base,) = class_in(tree_of(release, CPU_RUNNER), "CPUModelRunner").bases
    assert ast.unparse(base) == "GPUModelRunner"
    found = methods_of([class_in(tree_of(release, CPU_RUNNER), "CPUModelRunner")])
    assert "execute_model" not in found
    assert "load_model" in found


@BOTH
def test_dummy_runs_of_one_runner_call_the_model_and_of_the_other_say_what_they_are(
    release: str,
) -> None:
    first = methods(release, symbols.RUNNER_1)["_dummy_run"]
    assert "self.execute_model" not in calls_in(first)
    second = methods(release, symbols.RUNNER_2)["_dummy_run"]
    calls = [
        node
        for node in ast.walk(second)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.execute_model"
    ]
    assert calls
    for call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given["dummy_run"] == "True", "by keyword"


@BOTH
def test_a_worker_makes_up_steps_only_where_it_warms_up(release: str) -> None:
    worker = methods_of([class_in(tree_of(release, "v1/worker/gpu_worker.py"), "Worker")])
    handing_on = {
        name
        for name, method in worker.items()
        for node in ast.walk(method)
        if isinstance(node, ast.Call)
        and "self.execute_model" in {ast.unparse(each) for each in node.args}
    }
    # In 0.33 a method of that name with an underscore, which nothing else calls.
    callers = {
        name
        for name, method in worker.items()
        if {f"self.{each}" for each in handing_on} & set(calls_in(method))
    }
    assert (handing_on | callers) - {"_compile_or_warm_up_model"} == {"compile_or_warm_up_model"}


@BOTH
@RUNNERS
def test_the_model_runs_within_a_step_and_the_draft_model_while_sampling(
    release: str, runner: Symbol
) -> None:
    found = methods(release, runner)
    step = calls_in(found["execute_model"])
    assert {"self._model_forward", "self.model"} & set(step)
    assert not [call for call in step if call.endswith(("propose", "propose_draft_token_ids"))]
    sampling = [call.rpartition(".")[2] for call in calls_in(found["sample_tokens"])]
    assert {"propose", "propose_draft_token_ids"} & set(sampling)


@BOTH
def test_the_scheduler_says_how_many_tokens_a_step_has(release: str) -> None:
    fields = {
        node.target.id
        for node in class_in(tree_of(release, "v1/core/sched/output.py"), "SchedulerOutput").body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert "total_num_scheduled_tokens" in fields


@BOTH
def test_ids_are_handed_out_before_they_are_mapped_to_replicas(release: str) -> None:
    calls = calls_in(methods(release, symbols.ROUTER)["_select_experts"])
    order = [
        calls.index(f"self.{name}")
        for name in ("_compute_routing", "capture_fn", "_apply_eplb_mapping")
    ]
    assert order == sorted(order)


@BOTH
def test_only_a_kernel_that_is_not_monolithic_asks_the_router(release: str) -> None:
    function = methods(release, symbols.LAYER)["_apply_quant_method"]
    (branch,) = [
        node
        for node in function.body
        if isinstance(node, ast.If) and "is_monolithic" in ast.unparse(node.test)
    ]
    asks = "self.router.select_experts"
    assert asks not in [call for node in branch.body for call in calls_in(node)]
    assert asks in [call for node in branch.orelse for call in calls_in(node)]


@BOTH
def test_parallelism_has_the_fields_that_are_read(release: str) -> None:
    cls = class_in(tree_of(release, "config/parallel.py"), "ParallelConfig")
    fields = {
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert not set(symbols.PARALLEL_FIELDS) - fields
    assert "use_sequence_parallel_moe" in methods_of([cls])
    for name in ("get_tp_group", "get_ep_group"):
        function_in(release, "distributed/parallel_state.py", name)
    function_in(release, "forward_context.py", "get_forward_context")


@BOTH
def test_the_key_of_compiled_code_depends_on_the_configuration(release: str) -> None:
    key = methods_of([class_in(tree_of(release, "config/vllm.py"), "VllmConfig")])["compute_hash"]
    assert "self.additional_config" in ast.unparse(key)
    factors = function_in(release, "compilation/caching.py", "aot_compile_hash_factors")
    assert "vllm_config.compute_hash" in calls_in(factors)
    backend = ast.unparse(tree_of(release, "compilation/backends.py"))
    assert "vllm_config.compute_hash()" in backend
    assert "if not self.compilation_config.cache_dir" in backend


@BOTH
def test_a_server_has_the_names_that_recordings_get(release: str) -> None:
    model = class_in(tree_of(release, "config/model.py"), "ModelConfig")
    assert "served_model_name" in attributes_of([model])
    assert "instance_id: str" in ast.unparse(tree_of(release, "config/vllm.py"))
    suffix = ast.unparse(tree_of(release, "v1/engine/utils.py"))
    assert "{dp_vllm_config.instance_id}_dp{dp_rank}" in suffix
