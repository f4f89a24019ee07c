"""Probes at a real router of transformers: compiled, copied, hooked by others, called by threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dodoco_ext as dodoco

modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
HIDDEN, EXPERTS, TOP_K, TOKENS = 32, 8, 2, 12


def blocks(num_layers: int) -> torch.nn.Sequential:
    config = modeling.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="batched_mm",  # the one that compiles in one graph
    )
    torch.manual_seed(0)
    made = [modeling.Qwen3MoeSparseMoeBlock(config) for _ in range(num_layers)]
    for block in made:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return torch.nn.Sequential(*made).eval()


def inputs() -> torch.Tensor:
    return torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_passes(attachment: Any, passes: int) -> None:
    for layer in attachment.snapshot().layers:
        assert (layer.passes, layer.assignments) == (passes, passes * TOKENS * TOP_K)
    assert attachment.reader.header["num_faults"] == 0


def test_twelve_compiled_layers_share_one_code_and_record_once_a_call() -> None:
    model = blocks(12)
    with dodoco.attach(model) as attachment, torch.no_grad():
        for block in model:
            block.compile(fullgraph=True, backend="eager")
        hidden = model[0](inputs())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for block in model[1:]:
                hidden = block(hidden)
            model(inputs())
        assert_passes(attachment, 2)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_records_once_a_call(backend: str) -> None:
    model = blocks(2)
    with torch.no_grad():
        expected = model(inputs())
        with dodoco.attach(model) as attachment:
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            for _ in range(3):
                torch.testing.assert_close(compiled(inputs()), expected)
            assert_passes(attachment, 3)


def test_attaching_after_compilation_records() -> None:
    model = blocks(2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(inputs())
        with dodoco.attach(model) as attachment:
            compiled(inputs())
            assert_passes(attachment, 1)
        compiled(inputs())
        assert_passes(attachment, 1)


def test_a_copy_can_be_attached_to_and_records_once() -> None:
    model = blocks(2)
    with dodoco.attach(model) as original, torch.no_grad():
        copied = copy.deepcopy(model)
        with dodoco.attach(copied) as attachment:
            copied(inputs())
            assert_passes(attachment, 1)
        assert all("forward" not in module.__dict__ for module in copied.modules())
        model(inputs())
        assert_passes(original, 1)


def test_what_a_hook_makes_of_the_routers_choice_is_what_counts() -> None:
    model = blocks(1)
    planted = torch.zeros(TOKENS, TOP_K, dtype=torch.int64) + torch.tensor([3, 5])

    def replace(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return (*output[:2], planted)

    handle = model[0].gate.register_forward_hook(replace)
    with dodoco.attach(model) as attachment, torch.no_grad():
        model(inputs())
        counts = attachment.snapshot().layers[0].counts
        assert counts.tolist() == [0, 0, 0, TOKENS, 0, TOKENS, 0, 0]
    handle.remove()


def test_a_forward_that_somebody_wrapped_meanwhile_stays() -> None:
    model = blocks(1)
    gate = model[0].gate
    attachment = dodoco.attach(model)
    ours = gate.forward
    gate.forward = lambda *args: ours(*args)
    theirs = gate.forward
    with torch.no_grad():
        model(inputs())
        assert_passes(attachment, 1)
        attachment.detach()
        assert gate.forward is theirs
        model(inputs())
    assert_passes(attachment, 1)


def test_training_counts_once_and_gradients_are_untouched() -> None:
    model = blocks(2).train()
    model(inputs()).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with dodoco.attach(model) as attachment:
        model(inputs()).sum().backward()
        assert_passes(attachment, 1)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
