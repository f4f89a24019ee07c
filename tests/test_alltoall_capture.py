"""What a capture sees, leaves alone and puts back, in one process with a group of its own."""

from __future__ import annotations

import copy
import gc
import inspect
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.utils._python_dispatch import TorchDispatchMode

import deepep_stand_in as deepep
import dodoco_ext as dodoco
from dodoco_ext import ops
from dodoco_ext.errors import InputError
from dodoco_ext.integrations import collectives
from dodoco_ext.recorder import GroupSpec
from dodoco_ext.transfers import COMBINE, DISPATCH
from guard import HostSync, no_host_sync
from moe_layer import STYLES, AllToAll, MoELayer
from toy import ToyModel

ROWS = torch.arange(12.0).view(6, 2)


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def send(rows: torch.Tensor = ROWS, **options: Any) -> Any:
    return dist.all_to_all_single(torch.empty_like(rows), rows, **options)


def kinds(capture: dodoco.AlltoAllCapture) -> list[tuple[int, int, int]]:
    """(layer, op, rows sent) of each transfer, in order."""
    found = capture.reader.transfers()
    return [
        (int(record["layer"]), int(record["type"]), int(sent.sum()))
        for record, sent in zip(found.records, found.sent, strict=True)
    ]


def kernels() -> dict[str, str]:
    names = ("c10d::alltoall_base_", "c10d::alltoall_", "c10d::allreduce_", "aten::add.Tensor")
    return {name: torch._C._dispatch_dump(name) for name in names}


def methods() -> dict[str, Any]:
    return {**vars(dist.ProcessGroup)}


class Operators(TorchDispatchMode):
    """Names of the operators that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class TestTheMechanism:
    def test_outside_nothing_is_left(self) -> None:
        before = kernels(), methods()
        with dodoco.capture_alltoall(layers=1):
            assert kernels() != before[0]
            assert methods() != before[1]
        assert (kernels(), methods()) == before

    def test_inside_other_operators_are_untouched(self) -> None:
        before = kernels()
        with dodoco.capture_alltoall(layers=1):
            inside = kernels()
        assert {name for name in before if before[name] != inside[name]} == {
            "c10d::alltoall_base_",
            "c10d::alltoall_",
        }

    def test_a_plain_call_takes_the_short_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            # What the dispatcher's kernel would ask.
            monkeypatch.setattr(collectives, "_unbox_group", None)
            send()
            assert kinds(capture) == [(0, DISPATCH, 6)]

    def test_whoever_watches_operators_sees_them(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            with Operators() as operators:
                send()
            with torch.profiler.profile() as profile:
                send()
            assert kinds(capture) == [(0, DISPATCH, 6), (0, COMBINE, 6)]
        assert any("alltoall_base_" in name for name in operators.seen)
        assert any("alltoall_base_" in event.name for event in profile.events())

    def test_what_somebody_put_around_a_method_stays(self) -> None:
        called, before = [], methods()
        name = "all_to_all_single" if "all_to_all_single" in before else "alltoall_base"
        capture = dodoco.capture_alltoall(layers=1)
        ours = getattr(dist.ProcessGroup, name)

        def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return ours(self, *args, **kwargs)

        setattr(dist.ProcessGroup, name, theirs)
        try:
            send()
            assert kinds(capture) == [(0, DISPATCH, 6)]
            capture.close()
            send()
            assert called == [name, name]
            assert vars(dist.ProcessGroup)[name] is theirs
        finally:
            setattr(dist.ProcessGroup, name, before[name])
        assert methods() == before

    def test_a_subclass_of_tensors_and_named_arguments_take_the_long_way(self) -> None:
        class Plain(torch.Tensor):
            pass

        out = torch.empty_like(ROWS)
        with dodoco.capture_alltoall(layers=1) as capture:
            group = dist.group.WORLD
            group.alltoall_base(out, ROWS.as_subclass(Plain), [], [], dist.AllToAllOptions()).wait()
            group.alltoall_base(
                output=out, input=ROWS, output_split_sizes=[], input_split_sizes=[]
            ).wait()
            assert torch.equal(out, ROWS)
            assert kinds(capture) == [(0, DISPATCH, 6), (0, COMBINE, 6)]

    def test_other_groups_pass(self) -> None:
        other = dist.new_group([0])
        with dodoco.capture_alltoall(other, layers=1) as capture:
            send()
            assert kinds(capture) == []
            send(group=other)
            assert kinds(capture) == [(0, DISPATCH, 6)]

    def test_two_captures_of_two_groups_end_by_themselves(self) -> None:
        other = dist.new_group([0])
        with dodoco.capture_alltoall(layers=1) as first:
            with dodoco.capture_alltoall(other, layers=1) as second:
                send()
                send(group=other)
            send()
        assert kinds(first) == [(0, DISPATCH, 6), (0, COMBINE, 6)]
        assert kinds(second) == [(0, DISPATCH, 6)]

    def test_one_group_is_captured_once(self) -> None:
        with (
            dodoco.capture_alltoall(layers=1),
            pytest.raises(InputError, match="captured already"),
        ):
            dodoco.capture_alltoall(layers=1)

    def test_errors_are_the_hosts_own(self) -> None:
        def fail() -> tuple[type, str]:
            with pytest.raises(Exception) as caught:  # noqa: PT011
                dist.all_to_all_single(torch.empty(6, 2), ROWS, [5], [6])
            return caught.type, str(caught.value)

        bare = fail()
        with dodoco.capture_alltoall(layers=1) as capture:
            assert fail() == bare
            assert kinds(capture) == []

    def test_lists_of_tensors_count_rows_too(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            dist.all_to_all([torch.empty_like(ROWS)], [ROWS])
            assert kinds(capture) == [(0, DISPATCH, 6)]
            assert capture.reader.transfers().records["bytes_per_row"].tolist() == [8]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_every_grad_mode(self, mode: Any) -> None:
        with dodoco.capture_alltoall(layers=1) as capture, mode():
            send()
            assert kinds(capture) == [(0, DISPATCH, 6)]

    def test_a_telemetry_fault_stays_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            monkeypatch.setattr(capture.attribution, "place", lambda *_: 1 / 0)
            out = torch.empty_like(ROWS)
            dist.all_to_all_single(out, ROWS)
            assert torch.equal(out, ROWS)
            assert capture.reader.header["num_faults"] == 1


class TestArguments:
    def test_splits_may_be_arrays_as_before(self) -> None:
        out = torch.empty_like(ROWS)
        with dodoco.capture_alltoall(layers=1) as capture:
            dist.all_to_all_single(out, ROWS, np.array([6]), np.array([6]))
            assert torch.equal(out, ROWS)
            assert kinds(capture) == [(0, DISPATCH, 6)]

    def test_counts_that_cannot_be_read_are_a_fault_and_no_error(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            end = capture.writer.under_way(0, DISPATCH, ["x"], [1], 0)  # type: ignore[list-item]
            assert end(True) == -1
            assert capture.writer.under_way(0, DISPATCH, [1, 1], [1], 0)(True) == -1
            assert capture.reader.header["num_faults"] == 2
            assert kinds(capture) == []


class TestWaiting:
    def test_an_asynchronous_call_ends_where_it_is_waited_for(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            work = send(async_op=True)
            assert kinds(capture) == []
            work.wait()
            assert kinds(capture) == [(0, DISPATCH, 6)]
            work.wait()
            assert len(kinds(capture)) == 1

    def test_a_work_is_still_a_work(self) -> None:
        out = torch.empty_like(ROWS)
        with dodoco.capture_alltoall(layers=1):
            work = dist.all_to_all_single(out, ROWS, async_op=True)
            assert isinstance(work, dist.Work)
            work.wait()
            assert work.is_completed()
            assert torch.equal(out, ROWS)

    def test_polling_and_futures_end_it_too(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            work = send(async_op=True)
            while not work.is_completed():
                pass
            assert len(kinds(capture)) == 1
            send(async_op=True).get_future().wait()
            work.wait()
            deadline = time.monotonic() + 30  # a future wakes its waiters before it calls back
            while len(kinds(capture)) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(kinds(capture)) == 2

    def test_what_nobody_waits_for_has_no_duration(self) -> None:
        capture = dodoco.capture_alltoall(layers=1)
        work = send(async_op=True)
        capture.close()
        (record,) = capture.reader.transfers().records
        assert not record["timed"]
        work.wait()

    def test_functional_collectives_end_where_their_tensor_is_used(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            got = functional.all_to_all_single(ROWS, [6], [6], dist.group.WORLD)
            assert kinds(capture) == []
            assert torch.equal(got + 0, ROWS)
            assert kinds(capture) == [(0, DISPATCH, 6)]

    def test_compiled_code_is_captured_forward_and_backward(self) -> None:
        @torch.compile(fullgraph=True, backend="aot_eager")
        def layer(rows: torch.Tensor) -> torch.Tensor:
            there = functional.all_to_all_single_autograd(rows * 2, [6], [6], dist.group.WORLD)
            return functional.all_to_all_single_autograd(there + 1, [6], [6], dist.group.WORLD)

        rows = ROWS.clone().requires_grad_()
        with dodoco.capture_alltoall(layers=1) as capture:
            layer(rows).sum().backward()
            records = capture.reader.transfers().records
        assert [(r["type"], r["direction"]) for r in records] == [
            (DISPATCH, 0),
            (COMBINE, 0),
            (COMBINE, 1),
            (DISPATCH, 1),
        ]


class TestPlacing:
    def test_counts_that_are_exchanged_first_are_no_transfer(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            send(torch.tensor([6]))
            send()
            assert kinds(capture) == [(0, DISPATCH, 6)]
            assert capture.passed_over == {"control": 1}

    def test_a_scope_of_one_transfer_takes_the_first(self) -> None:
        with dodoco.capture_alltoall(layers=2) as capture:
            with capture.combine(1):
                send()
                send(torch.ones(6, 1))
            assert kinds(capture) == [(1, COMBINE, 6)]
            assert capture.passed_over == {"extra": 1}

    def test_an_inner_scope_takes_the_outer_layer(self) -> None:
        with dodoco.capture_alltoall(layers=["a", "b"]) as capture, capture.layer(1):
            with capture.dispatch():
                send()
            with capture.combine():
                send()
            assert kinds(capture) == [(1, DISPATCH, 6), (1, COMBINE, 6)]

    def test_in_order_layers_repeat_and_iterations_count(self) -> None:
        with dodoco.capture_alltoall(layers=2) as capture:
            for _ in range(8):
                send()
            records = capture.reader.transfers().records
        assert records["layer"].tolist() == [0, 0, 1, 1] * 2
        assert records["iteration"].tolist() == [0] * 4 + [1] * 4

    def test_restart_begins_at_the_first_layer(self) -> None:
        with dodoco.capture_alltoall(layers=2) as capture:
            send()
            capture.restart()
            send()
            assert kinds(capture) == [(0, DISPATCH, 6)] * 2

    def test_calls_outside_of_modules_are_counted_and_not_recorded(self) -> None:
        with dodoco.capture_alltoall(modules=[torch.nn.Linear(2, 2)]) as capture:
            rows = ROWS.clone().requires_grad_()
            AllToAll.apply(rows, [6], [6], None).sum().backward()
            assert kinds(capture) == []
            assert capture.passed_over == {"outside": 2}
            assert capture.reader.header["num_faults"] == 0

    def test_a_backward_call_of_an_unseen_forward_is_refused(self) -> None:
        rows = ROWS.clone().requires_grad_()
        out = AllToAll.apply(rows, [6], [6], None)
        with dodoco.capture_alltoall(layers=1) as capture:
            out.sum().backward()
            assert kinds(capture) == []
            assert capture.passed_over == {"unattributed": 1}
            assert capture.reader.header["last_fault"] == int(dodoco._C.Fault.UNATTRIBUTED.value)

    def test_backward_belongs_to_the_iteration_of_its_forward(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            losses = []
            for _ in range(3):
                rows = ROWS.clone().requires_grad_()
                there = AllToAll.apply(rows, [6], [6], None)
                losses.append(AllToAll.apply(there * 2, [6], [6], None).sum())
            for loss in (losses[1], losses[0], losses[2]):
                loss.backward()
            records = capture.reader.transfers().records
        back = records[records["direction"] == 1]
        assert back["iteration"].tolist() == [1, 1, 0, 0, 2, 2]

    def test_modules_are_as_they_were(self) -> None:
        plain, replaced = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        theirs = replaced.forward = lambda x: x
        with dodoco.capture_alltoall(modules={"a": plain, "b": replaced}) as capture:
            assert [layer.name for layer in capture.layers] == ["a", "b"]
            assert replaced(ROWS) is ROWS
            assert "forward" in vars(plain)
        assert "forward" not in vars(plain)
        assert vars(replaced)["forward"] is theirs

    def test_a_forward_that_somebody_wrapped_meanwhile_stays(self) -> None:
        module = torch.nn.Linear(2, 2)
        with dodoco.capture_alltoall(modules=[module]):
            ours = module.forward
            module.forward = wrapped = lambda x: ours(x)  # type: ignore[method-assign]
        assert module.forward is wrapped
        assert module(ROWS).shape == (6, 2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give one of"),
            ({"layers": 1, "modules": []}, "layers and modules given"),
            ({"layers": 0}, "name at least one"),
        ],
    )
    def test_what_layers_there_are_must_be_clear(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            dodoco.capture_alltoall(**arguments)

    def test_unknown_layers_are_refused(self) -> None:
        with dodoco.capture_alltoall(layers=2) as capture:
            with pytest.raises(InputError, match="layer 2"), capture.layer(2):
                pass
            with pytest.raises(InputError, match="which layer"), capture.dispatch():
                pass


class TestWithAttachment:
    def test_transfers_and_routing_share_a_recording(self) -> None:
        model = ToyModel()
        with dodoco.attach(model, group=dodoco.group_spec()) as attachment:
            capture = dodoco.capture_alltoall(attachment=attachment, model=model)
            with capture.layer(0):
                send()
            capture.close()
            assert attachment.snapshot().layers
            (record,) = attachment.reader.transfers().records
            assert record["type"] == DISPATCH

    def test_another_group_is_refused(self) -> None:
        spec = GroupSpec((0, 1), 0)
        with (
            dodoco.attach(ToyModel(), group=spec) as attachment,
            pytest.raises(InputError, match=r"\(0, 1\)"),
        ):
            dodoco.capture_alltoall(attachment=attachment)


class TestNoValueIsFetched:
    @pytest.mark.parametrize("fetch", ["item", "tolist", "cpu", "nonzero", "__bool__", "numpy"])
    def test_the_guard_sees_what_it_is_for(
        self, fetch: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = compile(f"def ours(t): return t.{fetch}()", ops.__file__, "exec")
        names: dict[str, Any] = {}
        exec(code, names)
        names["ours"](torch.ones(1))
        with no_host_sync(), pytest.raises(HostSync):
            names["ours"](torch.ones(1))
        with no_host_sync():
            getattr(torch.ones(1), fetch)()

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("mode", [True, False], ids=["operators", "short cut"])
    def test_capturing_a_layer_fetches_none(
        self, style: str, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not mode and style != "functional":
            monkeypatch.setattr(collectives, "_unbox_group", None)  # the operator is not asked
        layer = MoELayer(4, 8, 2, dist.group.WORLD, style)
        with dodoco.capture_alltoall(modules=[layer]) as capture, no_host_sync(mode=mode):
            layer(torch.randn(6, 4, requires_grad=True)).sum().backward()
            assert capture.passed_over == {"control": 1}
        assert len(capture.reader.transfers().records) == 4

    def test_probes_fetch_none(self) -> None:
        model = ToyModel()
        with dodoco.attach(model) as attachment, no_host_sync():
            model(torch.arange(6).view(1, 6))
        assert attachment.snapshot().layers[0].passes == 1

    def test_buffers_of_deepep_fetch_none(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer, num_local_experts=4, device="cpu")
            # numpy() of a host's tensor shares its memory; of a device's, nothing asks for it.
            with no_host_sync(allow=("numpy",)):
                deepep_round(buffer)
        assert len(capture.reader.transfers().records) == 2


def deepep_round(buffer: Any) -> None:
    x = torch.zeros(5, 8, dtype=torch.bfloat16)
    layout = buffer.get_dispatch_layout(torch.zeros(5, 2, dtype=torch.int64), 4)
    received, *_, handle, _ = buffer.dispatch(x, num_tokens_per_rank=layout[0])
    buffer.combine(received, handle)


class TestDeepEP:
    def test_the_stand_in_has_the_released_names(self) -> None:
        for name, parameters in deepep.SIGNATURES.items():
            signature = inspect.signature(getattr(deepep.Buffer, name))
            assert tuple(signature.parameters)[1:] == parameters
        handle = deepep.Buffer(torch.tensor([[1]]), 0).dispatch(torch.zeros(1, 1))[4]
        assert len(handle) == deepep.HANDLE_PARTS["intranode"]

    @pytest.mark.parametrize("internode", [False, True])
    def test_dispatch_and_combine_are_recorded(self, internode: bool) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        buffer.internode = internode
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            deepep_round(buffer)
            found = capture.reader.transfers()
        assert found.records["type"].tolist() == [DISPATCH, COMBINE]
        assert found.records["unit"].tolist() == [1, 1]
        assert found.records["bytes_per_row"].tolist() == [16, 16]
        assert np.array_equal(found.sent, [[5], [5]])
        assert np.array_equal(found.received, [[5], [5]])

    def test_rows_from_each_rank_are_computed_once_a_dispatch(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture, Operators() as operators:
            capture.observe_buffer(buffer)
            deepep_round(buffer)
            assert len(kinds(capture)) == 2
        assert operators.seen.count("aten.sub.Tensor") == 1, operators.seen

    @pytest.mark.parametrize("parts", [6, 10])
    def test_rows_from_each_rank_come_from_prefix_sums(self, parts: int) -> None:
        from dodoco_ext.integrations.deepep import received

        matrix = torch.tensor([[1, 2], [0, 4]], dtype=torch.int32)
        handle: list[Any] = [None] * parts
        if parts == 6:
            handle[0] = matrix.cumsum(0)
        else:
            handle[6] = matrix.cumsum(0)[:, 1]
        assert received(tuple(handle), 1).tolist() == [2, 4]

    def test_gradients_are_known_by_their_handle(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)

        class Dispatch(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                received, *_, ctx.handle, _ = buffer.dispatch(
                    x, num_tokens_per_rank=buffer.matrix[0]
                )
                return received

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
                return buffer.combine(gradients[0], ctx.handle)[0]

        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            Dispatch.apply(torch.zeros(5, 8, requires_grad=True)).sum().backward()
            records = capture.reader.transfers().records
        assert [(r["type"], r["direction"]) for r in records] == [(DISPATCH, 0), (DISPATCH, 1)]

    def test_our_counters_are_handed_in_and_read_on_demand(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        ids = torch.tensor([[0, 1], [1, 2]])
        with dodoco.capture_alltoall(layers=2) as capture:
            probe = capture.observe_buffer(buffer, num_local_experts=4, device="cpu")
            for layer in (0, 1, 1):
                with capture.layer(layer):
                    buffer.low_latency_dispatch(torch.zeros(2, 8), ids, 8, 4)
            for name, tensor in buffer.handed.items():
                assert tensor.dtype == deepep.DTYPES[name]
            counters = probe.counters()
        assert counters.received.tolist() == [[1, 2, 1, 0], [2, 4, 2, 0]]
        assert counters.wait.tolist() == [[[3]], [[6]]]

    def test_the_callers_own_counters_stay(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        own = torch.zeros(4, dtype=torch.int32)
        ids = torch.tensor([[0, 1]])
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer, num_local_experts=4, device="cpu")
            buffer.low_latency_dispatch(torch.zeros(1, 8), ids, 8, 4, own)
            assert buffer.handed["cumulative_local_expert_recv_stats"] is own

    def test_an_older_buffer_without_counters_is_called_as_before(self) -> None:
        class Old(deepep.Buffer):
            def low_latency_dispatch(  # type: ignore[override]
                self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int,
                num_experts: int, use_fp8: bool = True, async_finish: bool = False,
                return_recv_hook: bool = False,
            ) -> Any:  # fmt: skip
                return x

        names = tuple(inspect.signature(Old.low_latency_dispatch).parameters)[1:]
        assert names == deepep.OLD_LOW_LATENCY
        buffer = Old(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer, num_local_experts=4, device="cpu")
            assert buffer.low_latency_dispatch(ROWS, ROWS, 8, 4) is ROWS

    def test_what_finishes_later_is_recorded_where_the_stream_waits(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            received, *_, handle, event = buffer.dispatch(
                torch.zeros(5, 8), num_tokens_per_rank=buffer.matrix[0], async_finish=True
            )
            assert isinstance(event, deepep.EventOverlap)
            wait = event.current_stream_wait
            assert kinds(capture) == []
            wait()
            wait()
            assert kinds(capture) == [(0, DISPATCH, 5)]
            *_, back = buffer.combine(received, handle, async_finish=True)
            with back:
                assert len(kinds(capture)) == 1
            assert kinds(capture) == [(0, DISPATCH, 5), (0, COMBINE, 5)]
        assert (event.waits, back.waits) == (2, 1)
        assert type(back) is deepep.EventOverlap
        assert vars(back) == {"waits": 1}
        assert capture.passed_over == {}

    def test_what_nobody_waits_for_is_not_kept(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            gc.disable()
            try:
                result = buffer.dispatch(
                    torch.zeros(5, 8), num_tokens_per_rank=buffer.matrix[0], async_finish=True
                )
                kept = [weakref.ref(each) for each in (result[0], result[4][-1], result[-1])]
                del result
                gone = [each() is None for each in kept]
            finally:
                gc.enable()
        assert gone == [True, True, True]
        assert capture.passed_over == {"async_finish": 1}

    def test_a_combine_may_be_queued_before_its_dispatch_is_waited_for(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            received, *_, handle, sent = buffer.dispatch(
                torch.zeros(5, 8), num_tokens_per_rank=buffer.matrix[0], async_finish=True
            )
            *_, back = buffer.combine(received, handle, previous_event=sent, async_finish=True)
            back.current_stream_wait()
            assert kinds(capture) == [(0, COMBINE, 5)]
            assert capture.reader.header["num_faults"] == 0
        assert capture.passed_over == {"async_finish": 1}

    def test_two_captures_may_wait_for_one_event(self) -> None:
        from dodoco_ext.integrations.stream_events import when_waited

        event, told = deepep.EventOverlap(), []
        for name in "ab":
            assert when_waited(event, lambda name=name: told.append(name))  # type: ignore[misc]
        twin = copy.copy(event)
        event.current_stream_wait()
        twin.current_stream_wait()
        assert told == ["a", "b"]
        assert type(event) is type(twin) is deepep.EventOverlap

    def test_another_result_reaches_the_host_as_it_is(self) -> None:
        class Odd(deepep.Buffer):
            def dispatch(self, x: Any, handle: Any = None, num_tokens_per_rank: Any = None) -> Any:  # type: ignore[override]
                return (x,)

        buffer = Odd(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            assert buffer.dispatch(ROWS, num_tokens_per_rank=buffer.matrix[0]) == (ROWS,)
            assert capture.reader.header["num_faults"] == 1
            assert kinds(capture) == []

    @pytest.mark.parametrize("event", [None, object()])
    def test_what_cannot_be_waited_for_is_left_alone(self, event: object) -> None:
        from dodoco_ext.integrations.stream_events import when_waited

        assert not when_waited(event, lambda: None)

    def test_an_event_that_takes_no_other_class_is_left_alone(self) -> None:
        from dodoco_ext.integrations.stream_events import when_waited

        class Slotted:
            __slots__ = ()

            def current_stream_wait(self) -> int:
                return 7

        event = Slotted()
        assert not when_waited(event, lambda: None)
        assert event.current_stream_wait() == 7
        assert type(event) is Slotted

    def test_what_finishes_out_of_sight_is_counted_and_not_recorded(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            *_, event = buffer.dispatch(
                torch.zeros(5, 8), num_tokens_per_rank=buffer.matrix[0], async_finish=True
            )
        assert capture.passed_over == {"async_finish": 1}
        event.current_stream_wait()
        assert event.waits == 1
        assert kinds(capture) == []

    def test_the_buffer_is_as_it_was(self) -> None:
        buffer = deepep.Buffer(torch.tensor([[5]]), 0)
        theirs = buffer.combine = lambda *args: None  # type: ignore[method-assign]
        before = dict(vars(buffer))
        with dodoco.capture_alltoall(layers=1) as capture:
            capture.observe_buffer(buffer)
            assert vars(buffer) != before
        assert vars(buffer) == before
        assert buffer.combine is theirs

    def test_another_object_or_size_is_refused(self) -> None:
        with dodoco.capture_alltoall(layers=1) as capture:
            with pytest.raises(InputError, match=r"deep_ep\.Buffer"):
                capture.observe_buffer(object())
            with pytest.raises(InputError, match="2 ranks"):
                capture.observe_buffer(deepep.Buffer(torch.ones(2, 2), 0))


class TestSymmetricMemory:
    """The operators have CUDA kernels only: stand-ins for the host are registered here."""

    @pytest.fixture
    def host_kernels(self) -> Iterator[None]:
        library = torch.library.Library("symm_mem", "IMPL")

        def vdev(x: Any, out: Any, in_splits: Any, out_splits: Any, group: str) -> None:
            out_splits[0].copy_(in_splits)

        def vdev_2d(
            x: Any, out: Any, in_splits: Any, out_splits: Any, group: str, align: Any = None
        ) -> None:
            out_splits[0].copy_(in_splits)

        def vdev_2d_offset(x: Any, out: Any, given: Any, out_splits: Any, group: str) -> None:
            out_splits[0].copy_(given[0])

        library.impl("all_to_all_vdev", vdev, "CPU")
        library.impl("all_to_all_vdev_2d", vdev_2d, "CPU")
        library.impl("all_to_all_vdev_2d_offset", vdev_2d_offset, "CPU")
        yield
        library._destroy()

    def test_splits_are_read_after_the_call_and_not_fetched(self, host_kernels: None) -> None:
        name = dist.group.WORLD.group_name
        splits, back = torch.tensor([6]), torch.zeros(2, 1, dtype=torch.int64)
        with (
            dodoco.capture_alltoall(layers=1) as capture,
            no_host_sync(allow=("numpy",)),
        ):
            torch.ops.symm_mem.all_to_all_vdev(ROWS, ROWS.clone(), splits, back, name)
        found = capture.reader.transfers()
        assert (found.sent.tolist(), found.received.tolist()) == ([[6]], [[6]])

    def test_splits_by_expert_are_summed_by_rank_and_not_fetched(self, host_kernels: None) -> None:
        name = dist.group.WORLD.group_name
        splits, back = torch.tensor([1, 2, 3]), torch.zeros(2, 3, dtype=torch.int64)
        with (
            dodoco.capture_alltoall(layers=1) as capture,
            no_host_sync(allow=("numpy",)),
        ):
            torch.ops.symm_mem.all_to_all_vdev_2d(ROWS, ROWS.clone(), splits, back, name)
            torch.ops.symm_mem.all_to_all_vdev_2d_offset(
                ROWS, ROWS.clone(), back.clone(), back, name
            )
        found = capture.reader.transfers()
        assert found.records["type"].tolist() == [DISPATCH, COMBINE]
        assert (found.sent.tolist(), found.received.tolist()) == ([[6], [6]], [[6], [6]])
        assert found.experts[0].tolist() == [1, 2, 3]
