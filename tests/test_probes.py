"""What a probe meets: recomputation, copies of its model, faults, other devices, hidden routers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.attachment import _make_probe
from dodoco_ext.errors import NothingToObserve
from toy import Refusal, ToyModel, assert_recorded, some_tokens

TOKENS = some_tokens()


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_recomputed_passes_count_once(kind: str) -> None:
    model = ToyModel()
    model.checkpointing = kind
    with dodoco.attach(model) as a:
        for _ in range(2):
            model(TOKENS).sum().backward()
        assert_recorded(a, model, [TOKENS] * 2)
        assert [layer.recomputed for layer in a.snapshot().layers] == [2, 2, 2]
        records = a.reader.records()
        assert records["iteration"].tolist() == [0, 0, 0, 1, 1, 1]
        assert not records["recompute"].any()


def test_training_without_checkpointing_recomputes_nothing() -> None:
    model = ToyModel()
    with dodoco.attach(model) as a:
        model(TOKENS).sum().backward()
        assert_recorded(a, model, [TOKENS])
        assert [layer.recomputed for layer in a.snapshot().layers] == [0, 0, 0]


def test_a_copied_model_records_nothing_and_the_original_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ToyModel(num_layers=2)
    with dodoco.attach(model) as a:
        copied = copy.deepcopy(model)
        with caplog.at_level(logging.ERROR, "dodoco"):
            for _ in range(3):
                copied(TOKENS)
        assert [layer.passes for layer in a.snapshot().layers] == [0, 0]
        header = a.reader.header
        assert (header["num_faults"], header["last_fault"]) == (6, int(_C.Fault.COPIED_SITE))
        # Once a layer, not once a pass.
        assert len(caplog.records) == 2
        assert "attach to the copy" in caplog.text
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])


def test_a_copied_model_can_be_attached_to() -> None:
    model = ToyModel()
    with dodoco.attach(model) as a:
        copied = copy.deepcopy(model)
        with dodoco.attach(copied) as b:
            copied(TOKENS)
            assert_recorded(b, copied, [TOKENS])
            assert_recorded(a, model, [])
            assert a.reader.header["num_faults"] == b.reader.header["num_faults"] == 0
        copied(TOKENS)
    assert a.reader.header["num_faults"] == 0


def test_a_copy_outlives_the_recording() -> None:
    model = ToyModel()
    with dodoco.attach(model) as a:
        copied = copy.deepcopy(model)
    model(TOKENS)
    copied(TOKENS)
    assert_recorded(a, model, [])


def test_an_extractor_that_raises_does_not_break_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor:
        raise Refusal("no ids here")

    model = ToyModel(num_layers=2)
    bare = model(TOKENS)
    with dodoco.attach(model) as a, caplog.at_level(logging.ERROR, "dodoco"):
        hooks = model.layers[0].experts._forward_pre_hooks
        hooks[next(iter(hooks))] = _make_probe(broken, "ids")
        for _ in range(2):
            assert torch.equal(model(TOKENS), bare)
        assert [layer.passes for layer in a.snapshot().layers] == [0, 2]
        assert a.reader.header["last_fault"] == int(_C.Fault.INTERNAL)
        assert len(caplog.records) == 1
        assert "no ids here" in caplog.text


def test_a_router_whose_ids_cannot_be_counted_does_not_break_the_model() -> None:
    """More experts a token than it was said to have experts, after attaching."""
    model = ToyModel(num_layers=2)
    with dodoco.attach(model) as a:
        wide = torch.arange(9).remainder(8).expand(32, 9).contiguous()
        model.layers[0].router.table = wide
        model.layers[0].router.weights = torch.nn.Parameter(torch.rand(32, 9))
        model(TOKENS)
        model(TOKENS)
        assert [layer.passes for layer in a.snapshot().layers] == [0, 2]
        assert a.reader.header["num_faults"] == 1
        assert a.reader.header["last_fault"] == int(_C.Fault.BAD_SHAPE)


def test_a_model_on_the_meta_device_runs_and_records_nothing() -> None:
    model = ToyModel().to("meta")
    with dodoco.attach(model) as a:
        assert model(TOKENS.to("meta")).device.type == "meta"
        assert [layer.passes for layer in a.snapshot().layers] == [0, 0, 0]
        assert a.reader.header["num_faults"] == 0


def test_what_cannot_be_observed_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    class OneByOne(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    model = ToyModel(num_layers=2)
    model.hidden_routing = OneByOne()
    with caplog.at_level(logging.WARNING, "dodoco"), dodoco.attach(model) as a:
        (part,) = a.uncovered
        assert part.name == "hidden_routing"
        assert part.reason in caplog.text
        assert a.reader.metadata["uncovered"] == [{"name": part.name, "reason": part.reason}]
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])
    with pytest.raises(NothingToObserve, match="nothing in it can be observed") as caught:
        dodoco.attach(OneByOne())
    assert "\n" not in str(caught.value)


def test_a_pass_that_outlives_its_probe_does_not_fail_the_host() -> None:
    model = ToyModel(num_layers=1)
    attachment = dodoco.attach(model)
    hooked = next(m for m in model.modules() if "_dodoco_site" in m.__dict__)
    probe = next(iter((hooked._forward_pre_hooks or hooked._forward_hooks).values()))
    attachment.detach()
    # A call in another thread had collected its hooks before.
    probe(hooked, (), ())
    assert attachment.snapshot().layers[0].passes == 0
