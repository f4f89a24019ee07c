"""`dodoco_ext.megatron.attach`: what is taken from which class, and what is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dodoco_ext
from dodoco_ext.capture import COMBINE, DISPATCH
from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.integrations.patch import Patch
from guard import no_host_sync
from megatron_stubs import (
    EXPERTS,
    HIDDEN,
    RANKS,
    TOP_K,
    InferenceTopKRouter,
    Model,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
    OtherRouter,
    Wrapper,
    _DeepepManager,
    _HybridEPManager,
)

pytestmark = pytest.mark.timeout(120)

OWN = 1
SEND, RECEIVE, HERE = [3, 0, 2, 1], [1, 1, 0, 4], [2, 4]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A group of four of which this process is the second; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=OWN, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DODOCO_DIR", str(tmp_path / "recordings"))
    return tmp_path / "recordings"


def transfer(dispatcher: Any) -> torch.Tensor:
    """A forward pass of an AlltoAll dispatcher with the splits above."""
    dispatcher.preprocess((np.array(SEND), np.array(RECEIVE), torch.tensor(HERE)))
    dispatcher.tokens_per_expert = torch.tensor(HERE)
    tokens = torch.ones(sum(SEND), HIDDEN, requires_grad=True)
    out, _ = dispatcher.token_dispatch(tokens, torch.ones(sum(SEND)))
    return dispatcher.token_combine(out)


def rows(attachment: Any) -> list[tuple[int, int, list[int], list[int]]]:
    """(type, direction, sent, received) of each transfer."""
    found = attachment.reader.transfers()
    return [
        (int(r["type"]), int(r["direction"]), found.sent[i].tolist(), found.received[i].tolist())
        for i, r in enumerate(found.records)
    ]


# ---- routers


MAP = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 1]], dtype=torch.bool)
COUNTS = [1, 0, 0, 2, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(MAP, id="bool map"),
        pytest.param(MAP.to(torch.uint8), id="byte map"),
        pytest.param(torch.tensor([[0b00001001], [0b10001000]], dtype=torch.uint8), id="bit map"),
        pytest.param(torch.tensor([[0, 3], [7, 3]]), id="ids"),
        pytest.param(torch.tensor([[0, 3], [7, 3]], dtype=torch.int16), id="short ids"),
    ],
)
@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "beside a hook"])
def test_every_form_of_a_choice_counts_the_same(answer: torch.Tensor, hooked: bool) -> None:
    model = Model(MoEAlltoAllTokenDispatcher(), router=InferenceTopKRouter)
    router = model[0].router
    router.answer = answer
    if hooked:
        router.register_forward_hook(lambda *args: None)
    with dodoco_ext.megatron.attach(model) as attachment:
        _, choice = router(torch.ones(2, HIDDEN))
        assert choice is answer
        counted = attachment.snapshot().layers[0]
    assert counted.counts.tolist() == COUNTS
    assert (counted.tokens, counted.passes) == (2, 1)


def test_one_router_may_change_its_form() -> None:
    model = Model(MoEAlltoAllTokenDispatcher(), router=InferenceTopKRouter)
    with dodoco_ext.megatron.attach(model) as attachment:
        for answer in (MAP, torch.tensor([[0, 3], [7, 3]]), MAP):
            model[0].router.answer = answer
            model[0].router(torch.ones(2, HIDDEN))
        assert attachment.snapshot().layers[0].counts.tolist() == [3 * c for c in COUNTS]


def test_assignments_dropped_for_capacity_are_counted() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    model[0].router.answer = MAP & (torch.arange(EXPERTS) != 3)
    with dodoco_ext.megatron.attach(model) as attachment:
        model[0].router(torch.ones(2, HIDDEN))
        counted = attachment.snapshot().layers[0]
        assert attachment.log(None, 1)["moe/local_dropped_fraction_max"] == 0.5
    assert (counted.assignments, counted.capacity_dropped) == (2, 2)


def test_a_map_of_wide_integers_is_a_fault_and_not_a_count() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    model[0].router.answer = MAP.long()
    with dodoco_ext.megatron.attach(model) as attachment:
        model[0].router(torch.ones(2, HIDDEN))
        assert attachment.snapshot().layers[0].passes == 0
        assert attachment.reader.header["num_faults"] == 1


def test_routers_that_show_no_choice_are_uncovered_and_transfers_recorded() -> None:
    for model, reason in (
        (Model(MoEAlltoAllTokenDispatcher(), router=OtherRouter), "OtherRouter"),
        (
            Model(MoEAlltoAllTokenDispatcher(), moe_pad_expert_input_to_capacity=True),
            "always even",
        ),
    ):
        with dodoco_ext.megatron.attach(model) as attachment:
            assert reason in attachment.uncovered[0].reason
            assert not attachment.layers[0].routed
            for _ in range(2):
                transfer(model[0].token_dispatcher)
            iterations = attachment.reader.transfers().records["iteration"].tolist()
            assert iterations == [0, 0, 1, 1]  # no router tells where the next one begins
            assert attachment.log(None, 1) == {}


# ---- dispatchers


def test_counts_are_the_dispatchers_own_and_nothing_is_fetched() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        with no_host_sync(allow=("numpy",)):
            transfer(model[0].token_dispatcher).sum().backward()
        assert rows(attachment) == [
            (DISPATCH, 0, SEND, RECEIVE),
            (COMBINE, 0, RECEIVE, SEND),
            (COMBINE, 1, SEND, RECEIVE),
            (DISPATCH, 1, RECEIVE, SEND),
        ]
        assert attachment.reader.transfers().experts[0].tolist() == HERE


def test_rows_padded_to_a_capacity_go_in_equal_parts() -> None:
    dispatcher = MoEAlltoAllTokenDispatcher()
    dispatcher.drop_and_pad = True
    model = Model(dispatcher)
    with dodoco_ext.megatron.attach(model) as attachment:
        dispatcher.tokens_per_expert = torch.tensor([4, 4])
        dispatcher.token_dispatch(torch.ones(8, HIDDEN), torch.ones(8))
        assert rows(attachment) == [(DISPATCH, 0, [2] * RANKS, [2] * RANKS)]


def test_with_tensor_parallelism_experts_would_count_what_others_received() -> None:
    model = Model(MoEAlltoAllTokenDispatcher(tp_size=2))
    with dodoco_ext.megatron.attach(model) as attachment:
        transfer(model[0].token_dispatcher)
        assert attachment.reader.transfers().records["num_experts"].tolist() == [0, 0]


class OnDevice:
    """Splits that say they are on a device: reading them fails."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the host looked at {name} of counts on the device")


def test_splits_on_the_device_are_taken_before_they_move_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dispatcher = MoEAlltoAllTokenDispatcher()
    dispatcher.later = (np.array(SEND), np.array(RECEIVE), torch.tensor(HERE))
    model = Model(dispatcher)
    with dodoco_ext.megatron.attach(model):
        probe = dodoco_ext.integrations.megatron_dispatchers._probes[dispatcher]
        seen: list[Any] = []
        monkeypatch.setattr(
            probe.capture,
            "end",
            lambda transfer, send, receive, **rest: (
                seen.append((transfer.device, send, receive, rest["experts"], rest["timed"])) or -1
            ),
        )
        send, receive, experts = OnDevice(), OnDevice(), OnDevice()
        dispatcher.preprocess((send, receive, experts))
        dispatcher.input_splits = np.array(
            SEND
        )  # moved before the dispatch, to be waited for in it
        tokens = torch.ones(6, HIDDEN, requires_grad=True)
        out = dispatcher.token_combine(dispatcher.token_dispatch(tokens, torch.ones(6))[0])
        out.sum().backward()
    place = "cuda:0"
    assert seen == [
        (place, send, receive, experts, True),
        (place, receive, send, None, True),
        (place, send, receive, None, True),
        (place, receive, send, None, True),
    ]


@pytest.mark.parametrize("parts", [6, 10], ids=["within a node", "between nodes"])
def test_deepeps_handle_holds_rows_by_rank(parts: int) -> None:
    in_rank = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    handle: list[Any] = [None] * parts
    if parts == 6:
        prefix = torch.zeros(RANKS, RANKS, dtype=torch.int32)
        prefix[:, OWN] = torch.tensor([2, 2, 3, 7])
        handle[0], handle[4] = prefix, in_rank
    else:
        handle[0], handle[6] = in_rank, torch.tensor([2, 2, 3, 7], dtype=torch.int32)
    dispatcher = MoEFlexTokenDispatcher(_DeepepManager())
    dispatcher.next_handle = tuple(handle)
    model = Model(dispatcher)
    with dodoco_ext.megatron.attach(model) as attachment:
        tokens = torch.ones(3, HIDDEN, requires_grad=True)
        with no_host_sync(allow=("numpy",)):
            out, _ = dispatcher.token_dispatch(tokens)
            dispatcher.token_combine(out).sum().backward()
        sent, received = [2, 1, 2, 0], [2, 0, 1, 4]
        assert rows(attachment) == [
            (DISPATCH, 0, sent, received),
            (COMBINE, 0, received, sent),
            (COMBINE, 1, sent, received),
            (DISPATCH, 1, received, sent),
        ]
        records = attachment.reader.transfers().records
        assert (
            records["unit"].tolist() == [1] * 4
        )  # a token that two experts of a rank want goes once
        assert records["bytes_per_row"].tolist() == [4 * HIDDEN + 4 * TOP_K, *[4 * HIDDEN] * 3]


@pytest.mark.parametrize(
    "dispatcher",
    [lambda: MoEFlexTokenDispatcher(_HybridEPManager()), MoETokenDispatcher],
    ids=["HybridEP", "unknown"],
)
def test_dispatchers_whose_counts_are_not_known_are_uncovered(dispatcher: Any) -> None:
    model = Model(dispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        (part,) = attachment.uncovered
        assert part.name == "decoder.layers.0.mlp.token_dispatcher"
        model[0].token_dispatcher.calls.clear()
        assert attachment.reader.group is None
        model[0].router.answer = MAP
        model[0].router(torch.ones(2, HIDDEN))
        assert attachment.snapshot().layers[0].counts.tolist() == COUNTS


def test_a_fault_of_ours_turns_one_probe_off_and_the_model_goes_on() -> None:
    model = Model(MoEAlltoAllTokenDispatcher(), MoEAlltoAllTokenDispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        broken = model[0].token_dispatcher
        del broken.tokens_per_expert
        out, _ = broken.token_dispatch(torch.ones(6, HIDDEN), torch.ones(6))
        assert torch.equal(out, torch.full((6, HIDDEN), 2.0))
        assert attachment.reader.header["num_faults"] == 1
        transfer(model[1].token_dispatcher)
        assert attachment.reader.transfers().records["layer"].tolist() == [1, 1]


def test_an_error_of_the_hosts_is_the_hosts() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        with pytest.raises(TypeError):
            model[0].token_dispatcher.token_dispatch(torch.ones(6, HIDDEN))
        transfer(model[0].token_dispatcher)
        assert len(attachment.reader.transfers()) == 2


def test_layers_of_another_group_are_named_and_left_out() -> None:
    other = MoEAlltoAllTokenDispatcher()
    other.ep_group = dist.new_group([0, OWN])
    model = Model(MoEAlltoAllTokenDispatcher(), other)
    with dodoco_ext.megatron.attach(model) as attachment:
        (part,) = attachment.uncovered
        assert "[0, 1]" in part.reason
        transfer(model[0].token_dispatcher)
        transfer(other)
        assert attachment.reader.transfers().records["layer"].tolist() == [0, 0]


# ---- attach and detach


def test_detach_leaves_no_trace() -> None:
    model = Model(MoEAlltoAllTokenDispatcher(), MoEFlexTokenDispatcher(_DeepepManager()))
    things = [*model.modules(), *(model[i].token_dispatcher for i in range(2))]
    before = [dict(vars(thing)) for thing in things]
    attachment = dodoco_ext.megatron.attach(model)
    assert [dict(vars(thing)) for thing in things] != before
    attachment.detach()
    attachment.detach()
    assert [dict(vars(thing)) for thing in things] == before


def test_what_others_put_there_stays() -> None:
    dispatcher = MoEAlltoAllTokenDispatcher()
    theirs = dispatcher.token_combine
    dispatcher.token_combine = lambda *args: theirs(*args)  # before us
    before = dispatcher.token_combine
    model = Model(dispatcher)
    attachment = dodoco_ext.megatron.attach(model)
    ours = dispatcher.token_dispatch
    dispatcher.token_dispatch = later = lambda *args: ours(*args)  # and around us
    transfer(dispatcher)
    assert [row[0] for row in rows(attachment)] == [DISPATCH, COMBINE]
    attachment.detach()
    assert dispatcher.token_combine is before
    assert dispatcher.token_dispatch is later
    transfer(dispatcher)  # through ours, which now does nothing
    assert dispatcher.calls == ["dispatch", "combine"] * 2
    assert len(rows(attachment)) == 2


def test_a_copy_of_an_attached_model_works_by_itself_and_records_nothing() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        model[0].token_dispatcher.ep_group = model[0].token_dispatcher.tp_ep_group = None
        twin = copy.deepcopy(model)
        twin[0].router(torch.ones(1, HIDDEN))
        transfer(twin[0].token_dispatcher)
        assert twin[0].token_dispatcher.calls == ["dispatch", "combine"]
        assert model[0].token_dispatcher.calls == []
        assert rows(attachment) == []


def test_a_model_that_goes_takes_its_probes_along() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    gone = weakref.ref(model), weakref.ref(model[0].token_dispatcher)
    attachment = dodoco_ext.megatron.attach(model)
    transfer(model[0].token_dispatcher)
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert attachment.reader.header["closed"]


def test_attaching_twice_is_refused() -> None:
    model = Model(MoEAlltoAllTokenDispatcher(), router=OtherRouter)  # no router is a witness
    with (
        dodoco_ext.megatron.attach(model),
        pytest.raises(InputError, match="already attached"),
    ):
        dodoco_ext.megatron.attach(model)
    dodoco_ext.megatron.attach(model).detach()


def test_names_are_those_of_the_model_without_wrappers() -> None:
    model = Wrapper(Wrapper(Model(MoEAlltoAllTokenDispatcher(), first=5, num_layers=8)))
    with dodoco_ext.megatron.attach(model) as attachment:
        assert [layer.name for layer in attachment.layers] == ["decoder.layers.4.mlp.router"]


def test_a_dense_model_has_nothing_to_observe() -> None:
    with pytest.raises(NothingToObserve, match="BaseMoELayer"):
        dodoco_ext.megatron.attach(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="int"):
        dodoco_ext.megatron.attach([3])  # type: ignore[list-item]


def test_a_stage_without_moe_layers_is_attached_and_says_so() -> None:
    with dodoco_ext.megatron.attach(Model()) as attachment:
        assert attachment.layers == ()
        assert attachment.uncovered[0].reason == "no MoE layer is on this pipeline stage"
        assert attachment.log(None, 1, reduce="group") == {}


# ---- metrics


class Board:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


class Run:
    """As a W&B run: `log(values, step)`."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((data, step))


def test_scalars_are_those_of_the_window_by_layer_and_over_layers() -> None:
    model = Model(*(MoEAlltoAllTokenDispatcher() for _ in range(3)), num_layers=3)
    board, run = Board(), Run()
    with dodoco_ext.megatron.attach(model) as attachment:
        for step in range(2):
            for layer in range(3):
                model[layer].router.answer = torch.roll(MAP, step, 1)[: 1 + (layer > 0)]
                model[layer].router(torch.ones(2, HIDDEN))
            values = attachment.log([board, None, run], step, per_layer=True)
    uneven, even = 0.75, 0.6875  # Gini of one count of two ones, and of one, two and one
    assert values["moe/local_gini_layer_0"] == uneven
    assert values["moe/local_gini_layer_1"] == values["moe/local_gini_p50"] == even
    assert values["moe/local_gini_max"] == uneven
    assert values["moe/local_max_over_mean_p50"] == 4
    assert values["moe/local_unused_experts_max"] == 6
    assert 0 <= values["moe/local_corrected_gini_p90"] <= uneven
    assert run.logged[1] == (values, 1)
    assert board.scalars[-len(values) :] == [(tag, value, 1) for tag, value in values.items()]


def test_a_writer_that_is_none_is_refused() -> None:
    model = Model(MoEAlltoAllTokenDispatcher())
    with dodoco_ext.megatron.attach(model) as attachment:
        with pytest.raises(InputError, match="int is no writer"):
            attachment.log(3, 1)
        with pytest.raises(InputError, match="'world'"):
            attachment.log(None, 1, reduce="world")  # type: ignore[arg-type]


# ---- patch


class Thing:
    def name(self) -> str:
        return "class"


def test_a_patch_is_undone_once_and_only_while_it_is_there() -> None:
    thing = Thing()
    patch = Patch(thing, "name", lambda self: "ours, not " + patch.call(self))
    assert thing.name() == "ours, not class"
    patch.undo()
    assert "name" not in vars(thing)
    thing.name = MethodType(lambda self: "theirs", thing)  # type: ignore[method-assign]
    patch.undo()
    assert thing.name() == "theirs"
    with pytest.raises(AttributeError):
        Patch(thing, "nothing", lambda self: None)
