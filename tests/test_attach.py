"""attach(): sees every planted choice, changes nothing, and leaves no trace."""

from __future__ import annotations

import gc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import reference
from dodoco_ext.errors import InputError, NothingToObserve, RecordingError
from dodoco_ext.settings import Settings
from toy import PlantedRouter, Refusal, ToyBlock, ToyModel, assert_recorded, some_tokens

TOKENS = some_tokens()


def traces(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The attributes of every module, hooks included, as far as identity and order go."""
    return [
        {
            name: list(value.items()) if isinstance(value, OrderedDict | dict) else value
            for name, value in module.__dict__.items()
        }
        for module in model.modules()
    ]


def assert_untouched(model: torch.nn.Module, before: list[dict[str, Any]]) -> None:
    after = traces(model)
    assert [list(each) for each in after] == [list(each) for each in before]
    for was, now in zip(before, after, strict=True):
        for name in was:
            assert was[name] is now[name] or was[name] == now[name], name


def test_a_planted_router_is_recovered_exactly() -> None:
    model = ToyModel(num_layers=4, num_experts=60, top_k=6)
    passes = [some_tokens((3, 50), seed) for seed in range(5)]
    with dodoco.attach(model, labels={"model_name": "toy"}) as a, torch.no_grad():
        for tokens in passes:
            model(tokens)
        assert_recorded(a, model, passes)
        assert [(layer.num_experts, layer.top_k) for layer in a.layers] == [(60, 6)] * 4
        assert [layer.name for layer in a.layers] == [f"layers.{i}.experts" for i in range(4)]
        assert a.uncovered == ()
        assert a.reader.metadata["labels"] == {"model_name": "toy"}
        assert a.reader.header["num_faults"] == 0


def test_each_record_is_one_layer_of_one_pass() -> None:
    model = ToyModel(num_layers=3)
    passes = [some_tokens((1, 5 + seed), seed) for seed in range(4)]
    with dodoco.attach(model) as a:
        for tokens in passes:
            model(tokens)
        records = a.reader.records()
    assert records["layer"].tolist() == [0, 1, 2] * 4
    assert records["iteration"].tolist() == [i for i in range(4) for _ in range(3)]
    for record in records:
        tokens = passes[record["iteration"]]
        expected = reference.route_ids(model.ids(tokens)[record["layer"]], 8)
        assert record["gini_numerator"] == expected.gini_numerator
        assert record["max_count"] == expected.max_count
        assert record["tokens"] == tokens.numel()


@pytest.mark.parametrize("mode", ["train", "no_grad", "inference_mode"])
def test_outputs_are_bit_identical(mode: str) -> None:
    model = ToyModel()
    context = {
        "train": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[mode]()
    with context:
        bare = model(TOKENS)
        with dodoco.attach(model) as a:
            observed = model(TOKENS)
            assert_recorded(a, model, [TOKENS])
    assert torch.equal(bare, observed)
    if mode == "train":
        gradients = torch.autograd.grad(bare.sum(), model.parameters())
        observed_gradients = torch.autograd.grad(observed.sum(), model.parameters())
        assert all(map(torch.equal, gradients, observed_gradients))


def test_attaching_inside_inference_mode_records_outside_of_it_too() -> None:
    model = ToyModel()
    with torch.inference_mode():
        a = dodoco.attach(model)
        model(TOKENS)
    model(TOKENS).sum().backward()
    assert_recorded(a, model, [TOKENS, TOKENS])
    a.detach()


def test_detach_restores_every_module() -> None:
    model = ToyModel()
    calls: list[str] = []
    model.layers[1].experts.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.layers[1].experts.register_forward_hook(lambda *_: calls.append("post"))
    before = traces(model)
    with dodoco.attach(model):
        model(TOKENS)
        assert traces(model) != before
    assert_untouched(model, before)
    model(TOKENS)
    assert calls == ["pre", "post"] * 2


def test_detach_restores_every_module_when_the_model_raises() -> None:
    model = ToyModel()
    before = traces(model)
    model.layers[1].experts.fails = True
    with pytest.raises(Refusal), dodoco.attach(model) as a:
        model(TOKENS)
    model.layers[1].experts.fails = False
    assert_untouched(model, before)
    assert [layer.passes for layer in a.snapshot().layers] == [1, 1, 0]
    assert a.reader.state == "closed"


def test_a_hook_added_while_attached_stays() -> None:
    model = ToyModel(num_layers=1)
    calls: list[int] = []
    with dodoco.attach(model):
        handle = model.layers[0].experts.register_forward_pre_hook(lambda *_: calls.append(1))
    model(TOKENS)
    assert calls == [1]
    handle.remove()


def test_a_failed_attach_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel()
    before = traces(model)

    def refuse(*_: object, **__: object) -> None:
        raise Refusal

    last = model.layers[-1].experts
    monkeypatch.setattr(last, "register_forward_pre_hook", refuse)
    with pytest.raises(Refusal):
        dodoco.attach(model)
    monkeypatch.undo()
    assert_untouched(model, before)
    with dodoco.attach(model) as a:
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])


def test_detach_is_idempotent_and_records_stay_readable() -> None:
    model = ToyModel()
    a = dodoco.attach(model)
    model(TOKENS)
    a.detach()
    a.detach()
    model(TOKENS)
    assert_recorded(a, model, [TOKENS])
    assert len(a.reader.records()) == 3
    assert dodoco.open(a.path).state == "closed"


def test_attaching_twice_is_refused_and_the_first_goes_on(recordings: Path) -> None:
    model = ToyModel()
    with dodoco.attach(model) as a:
        with pytest.raises(InputError, match="already attached to: detach") as caught:
            dodoco.attach(model)
        with pytest.raises(InputError, match="already attached to"):
            dodoco.attach(model.layers[1])
        assert "\n" not in str(caught.value)
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])
        assert len(list(recordings.iterdir())) == 1
    with dodoco.attach(model) as again:
        model(TOKENS)
        assert_recorded(again, model, [TOKENS])


def test_two_models_are_two_recordings() -> None:
    one, other = ToyModel(), ToyModel(num_layers=2, num_experts=16)
    with dodoco.attach(one) as a, dodoco.attach(other) as b:
        one(TOKENS)
        for _ in range(2):
            other(TOKENS)
        assert a.path != b.path
        assert_recorded(a, one, [TOKENS])
        assert_recorded(b, other, [TOKENS] * 2)


def test_a_part_of_a_model_can_be_attached_to() -> None:
    model = ToyModel()
    with dodoco.attach(model.layers[1]) as a:
        model(TOKENS)
        assert [layer.passes for layer in a.snapshot().layers] == [1]


def test_nobody_has_to_keep_the_attachment() -> None:
    model = ToyModel()
    path = dodoco.attach(model).path
    gc.collect()
    model(TOKENS)
    reader = dodoco.open(path)
    assert reader.state == "live"
    assert [layer.passes for layer in reader.snapshot().layers] == [1, 1, 1]
    del model
    gc.collect()
    assert reader.state == "closed"


@pytest.mark.parametrize("thing", [None, "model", 3, ToyModel, [ToyModel()]], ids=repr)
def test_what_is_no_module_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module, not") as caught:
        dodoco.attach(thing)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_dense_model_is_refused_in_one_line(recordings: Path) -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with pytest.raises(NothingToObserve, match="no MoE router in Sequential: looked for") as caught:
        dodoco.attach(dense)
    assert "\n" not in str(caught.value)
    assert not recordings.exists()


@pytest.mark.parametrize("labels", [{"a": 1}, {1: "a"}, {"a": None}])
def test_labels_are_text(labels: Any, recordings: Path) -> None:
    model = ToyModel()
    before = traces(model)
    with pytest.raises(InputError, match="names and values must be strings"):
        dodoco.attach(model, labels=labels)
    assert_untouched(model, before)
    assert not recordings.exists()


def test_a_recording_that_does_not_fit_is_one_line_and_leaves_no_trace(recordings: Path) -> None:
    model = ToyModel()
    before = traces(model)
    with pytest.raises(RecordingError, match="DODOCO_MAX_BYTES") as caught:
        dodoco.attach(model, settings=Settings(directory=recordings, max_bytes=1000))
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)
    assert list(recordings.iterdir()) == []


def test_paused_passes_are_no_traffic_but_advance_the_iteration() -> None:
    model = ToyModel()
    with dodoco.attach(model) as a:
        with a.paused():
            assert not a.enabled
            model(TOKENS)
        assert a.enabled
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])
        assert set(a.reader.records()["iteration"].tolist()) == {1}


def test_paused_restores_what_was_before_also_after_an_error() -> None:
    with dodoco.attach(ToyModel()) as a:
        with pytest.raises(Refusal), a.paused():
            raise Refusal
        assert a.enabled
        a.enabled = False
        with a.paused():
            pass
        assert not a.enabled


def test_num_valid_turns_later_rows_into_padding() -> None:
    model = ToyModel()
    tokens = TOKENS.reshape(-1)
    with dodoco.attach(model) as a:
        assert a.num_valid is None
        a.num_valid = 5
        model(tokens)
        assert a.num_valid == 5
        a.num_valid = None
        model(tokens)
        for index, layer in enumerate(a.snapshot().layers):
            ids = model.ids(tokens)[index]
            part, whole = reference.route_ids(ids, 8, 5), reference.route_ids(ids, 8)
            np.testing.assert_array_equal(layer.counts, part.counts + whole.counts)
            assert layer.padded == (len(tokens) - 5) * 2
            assert layer.tokens == len(tokens) + 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_valid", -1),
        ("record_every", 0),
        ("record_every", -3),
        ("microbatch", -1),
        ("microbatch", 1 << 16),
    ],
)
def test_controls_refuse_values_that_mean_nothing(name: str, value: int) -> None:
    with dodoco.attach(ToyModel()) as a:
        before = getattr(a, name)
        with pytest.raises(InputError, match=rf"{name}={value}: give"):
            setattr(a, name, value)
        assert getattr(a, name) == before


def test_microbatch_stands_in_the_records() -> None:
    model = ToyModel(num_layers=1)
    with dodoco.attach(model) as a:
        for microbatch in (0, 3, 65535):
            a.microbatch = microbatch
            model(TOKENS)
        assert a.reader.records()["microbatch"].tolist() == [0, 3, 65535]


def test_the_toy_router_is_planted() -> None:
    """The other tests lean on it: the ids that the experts receive are the table's."""
    block = ToyBlock(8, 2, 4, 32, seed=1)
    seen: list[torch.Tensor] = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    tokens = some_tokens((6,))
    block(torch.rand(6, 4), tokens)
    assert torch.equal(seen[0], block.router.table[tokens])
    assert isinstance(block.router, PlantedRouter)
    assert all(len(set(row.tolist())) == 2 for row in block.router.table)


def test_the_counters_stay_readable_when_the_file_is_deleted() -> None:
    """As start-up scripts of some serving stacks do with all of /dev/shm."""
    model, tokens = ToyModel(num_layers=1), some_tokens((1, 10))
    with dodoco.attach(model) as a:
        a.path.unlink()
        model(tokens)
        assert a.snapshot().layers[0].tokens == 10
    assert a.reader.state == "closed"


def test_a_choice_of_a_lane_is_of_one_recording_and_ends() -> None:
    """Choices nest, end in any order, and say nothing about another model."""
    one, other, tokens = ToyModel(num_layers=1), ToyModel(num_layers=1), some_tokens()
    with dodoco.attach(one, lanes=3) as a, dodoco.attach(other, lanes=2) as b:
        outer, inner = a.lane(1), b.lane(1)
        with outer:
            one(tokens)
            other(tokens)
            with a.lane(2):
                one(tokens)
            inner.__enter__()
            one(tokens)
            other(tokens)
        one(tokens)
        other(tokens)
        inner.__exit__(None, None, None)
        other(tokens)
        assert a.reader.records()["lane"].tolist() == [1, 2, 1, 0]
        assert b.reader.records()["lane"].tolist() == [0, 1, 1, 0]


def test_num_valid_is_of_the_threads_lane_and_enabled_of_all() -> None:
    model, tokens = ToyModel(num_layers=1), some_tokens((1, 10))
    with dodoco.attach(model, lanes=2) as a:
        with a.lane(1):
            a.num_valid = 4
            model(tokens)
            assert a.num_valid == 4
        assert a.num_valid is None
        model(tokens)
        with a.paused(), a.lane(1):
            model(tokens)
        assert a.snapshot().layers[0].tokens == 14
        assert a.snapshot().layers[0].passes == 2


@pytest.mark.parametrize("lanes", [0, 17])
def test_an_impossible_number_of_lanes_is_refused(lanes: int) -> None:
    with pytest.raises(InputError, match=f"lanes={lanes}: give 1 to 16"):
        dodoco.attach(ToyModel(), lanes=lanes)


def test_a_lane_that_is_not_there_is_refused() -> None:
    with (
        dodoco.attach(ToyModel()) as a,
        pytest.raises(InputError, match="lane 1: this recording has 1, numbered from 0"),
        a.lane(1),
    ):
        pass
