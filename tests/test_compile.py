"""torch.compile: each call records exactly once, whatever is compiled, and whenever."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.attachment import Attachment, _make_probe
from toy import Refusal, ToyModel, assert_recorded, some_tokens

LAYERS = 12
TOKENS, OTHERS = some_tokens(), some_tokens(seed=1)
# Each returns a callable that runs the model, compiled.
Compile = Callable[[ToyModel, str], Callable[[torch.Tensor], torch.Tensor]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def wrapped(model: ToyModel, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    return compiled  # type: ignore[no-any-return]


def in_place(model: ToyModel, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    model.compile(fullgraph=True, backend=backend)
    return model


def regional(model: ToyModel, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=backend)
    return model


def closure(model: ToyModel, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.compile(fullgraph=True, backend=backend)
    def step(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens) * 2  # type: ignore[no-any-return]

    return step


def method(model: ToyModel, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
    return model


WAYS: list[Compile] = [wrapped, in_place, regional, closure, method]
every_way = pytest.mark.parametrize("compile_it", WAYS, ids=lambda way: way.__name__)


def assert_sound(a: Attachment) -> None:
    """No fault (a cloned site would be one) and no graph break."""
    assert a.reader.header["num_faults"] == 0
    assert not counters["graph_break"]


@every_way
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_each_call_records_once(compile_it: Compile, grad: bool) -> None:
    model = ToyModel(num_layers=LAYERS)
    with dodoco.attach(model) as a, torch.set_grad_enabled(grad):
        run = compile_it(model, "eager")
        for _ in range(3):
            run(TOKENS)
        run(OTHERS)
        assert_recorded(a, model, [TOKENS] * 3 + [OTHERS])
        assert_sound(a)
        assert a.reader.records()["layer"].tolist() == list(range(LAYERS)) * 4
        assert a.reader.records()["iteration"].max() == 3


def test_layers_share_one_compiled_code() -> None:
    """Eleven more layers of the same code: no recompilation, by error and by count."""
    model = ToyModel(num_layers=LAYERS)
    with dodoco.attach(model) as a:
        run = regional(model, "eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                run(TOKENS)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["recompiles"]
        assert_recorded(a, model, [TOKENS] * 2)
        assert_sound(a)


def test_the_whole_model_is_one_graph_with_one_op_a_layer() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = ToyModel(num_layers=LAYERS)
    with dodoco.attach(model) as a:
        run = torch.compile(model, fullgraph=True, backend=keep)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(TOKENS)
            run(OTHERS)
        (graph,) = graphs
        calls = [node for node in graph.graph.nodes if "route_ids" in str(node.target)]
        assert len(calls) == LAYERS
        assert len({node.args[1] for node in calls}) == LAYERS
        assert_recorded(a, model, [TOKENS, OTHERS])


@pytest.mark.parametrize("way", [wrapped, regional], ids=lambda way: way.__name__)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_inductor_calls_each_op_once_and_copies_no_site(way: Compile, grad: bool) -> None:
    num_layers = 2 if way is wrapped else LAYERS
    model = ToyModel(num_layers=num_layers)
    with dodoco.attach(model) as a, torch.set_grad_enabled(grad):
        run = way(model, "inductor")
        output, sources = run_and_get_code(run, TOKENS)
        assert torch.allclose(output, run(TOKENS))
        assert_recorded(a, model, [TOKENS] * 2)
        assert_sound(a)
    code = "\n".join(sources)
    calls = [line for line in code.splitlines() if "dodoco.route_ids.default(" in line]
    assert len(calls) == (num_layers if way is wrapped else 1)
    for line in calls:
        site = line.rpartition("(")[2].rstrip(") ").split(",")[-1].strip()
        # An input of the graph, as it came: a buffer of the graph's own would be a copy.
        assert site.startswith(("arg", "primals")), line
        assert f"{site}.clone" not in code


@every_way
def test_attaching_after_compilation_records(
    compile_it: Compile, caplog: pytest.LogCaptureFixture
) -> None:
    model = ToyModel(num_layers=3)
    run = compile_it(model, "eager")
    bare = run(TOKENS)
    with caplog.at_level(logging.WARNING, "dodoco"), dodoco.attach(model) as a:
        assert "compiled with probes" in caplog.text
        for _ in range(2):
            assert torch.equal(run(TOKENS), bare)
        assert_recorded(a, model, [TOKENS] * 2)
        assert_sound(a)


def test_attaching_to_the_compiled_module_itself_records() -> None:
    model = ToyModel(num_layers=3)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    compiled(TOKENS)
    with dodoco.attach(compiled) as a:
        compiled(TOKENS)
        assert_recorded(a, model, [TOKENS])
        assert a.layers[0].name == "layers.0.experts"


@every_way
def test_after_detach_compiled_code_runs_and_records_nothing(compile_it: Compile) -> None:
    model = ToyModel(num_layers=3)
    with dodoco.attach(model) as a:
        run = compile_it(model, "eager")
        observed = run(TOKENS)
    for _ in range(2):
        assert torch.equal(run(TOKENS), observed)
    assert_recorded(a, model, [TOKENS])
    assert a.reader.header["num_faults"] == 0


@every_way
def test_a_second_attachment_records_in_turn(compile_it: Compile) -> None:
    model = ToyModel(num_layers=3)
    with dodoco.attach(model) as a:
        run = compile_it(model, "eager")
        run(TOKENS)
    run(TOKENS)
    with dodoco.attach(model) as b:
        run(OTHERS)
        run(OTHERS)
        assert_recorded(b, model, [OTHERS] * 2)
    assert_recorded(a, model, [TOKENS])


def test_controls_act_on_compiled_code_without_recompilation() -> None:
    model = ToyModel(num_layers=3)
    with dodoco.attach(model) as a:
        run = wrapped(model, "eager")
        run(TOKENS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            with a.paused():
                run(TOKENS)
            a.num_valid = 4
            run(TOKENS)
        layer = a.snapshot().layers[0]
        assert (layer.passes, layer.tokens) == (2, TOKENS.numel() + 4)


def test_other_sizes_and_dynamic_shapes_record() -> None:
    model = ToyModel(num_layers=3)
    passes = [some_tokens((1, size)) for size in (3, 8, 21)]
    with dodoco.attach(model) as a:
        run: Any = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        for tokens in passes:
            run(tokens)
        assert_recorded(a, model, passes)


@pytest.mark.parametrize("kind", ["non-reentrant"])
def test_recomputation_in_a_compiled_layer_counts_once(kind: str) -> None:
    model = ToyModel(num_layers=3)
    model.checkpointing = kind
    with dodoco.attach(model) as a:
        run = regional(model, "eager")
        run(TOKENS).sum().backward()
        assert_recorded(a, model, [TOKENS])
        assert [layer.recomputed for layer in a.snapshot().layers] == [1, 1, 1]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_extractor_that_raises_does_not_break_a_compiled_model(fullgraph: bool) -> None:
    def broken(module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor:
        raise Refusal("no ids here")

    model = ToyModel(num_layers=2)
    bare = model(TOKENS)
    with dodoco.attach(model) as a:
        hooks = model.layers[0].experts._forward_pre_hooks
        hooks[next(iter(hooks))] = _make_probe(broken, "ids")
        run: Any = torch.compile(model, fullgraph=fullgraph, backend="eager")
        for _ in range(2):
            assert torch.equal(run(TOKENS), bare)
        assert [layer.passes for layer in a.snapshot().layers] == [0, 2]
        assert a.reader.header["last_fault"] == int(_C.Fault.INTERNAL)


def test_a_backend_that_clones_the_site_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Recorded exactly, or a fault in so many words: never silently nothing."""
    model = ToyModel(num_layers=2)
    with dodoco.attach(model) as a, caplog.at_level(logging.ERROR, "dodoco"):
        run = wrapped(model, "aot_eager")
        run(TOKENS)
        if a.reader.header["num_faults"] == 0:
            assert_recorded(a, model, [TOKENS])
        else:
            assert a.reader.header["last_fault"] == int(_C.Fault.COPIED_SITE)
            assert "clones what an op may change" in caplog.text
