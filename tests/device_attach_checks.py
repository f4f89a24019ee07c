"""A model attached to on a fake device, whose kernels run in Triton's interpreter.

Everything but the GPU is there: probes, ops, the C++ path, the driver's calls, the kernel, the file.
Run by test_device_attach.py in a process of its own: Triton decides when it is imported whether it
interprets. `device_attach_checks.py NAME ...` runs `check_NAME` for each.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from dodoco_ext.triton_kernels import build, route_stats

import dodoco_ext as dodoco
from dodoco_ext import attachment, device
from dodoco_ext.errors import InputError
from dodoco_ext.integrations import places
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recorder import Recorder
from dodoco_ext.settings import Settings
from fake_cuda import FakeCuda, Live
from fake_torch import CUDA, exchange
from toy import ToyModel, assert_recorded, some_tokens

NOTHING = Live(0, 0, 0, 0, 0)
PASSES = [some_tokens((rows,), seed) for seed, rows in enumerate((18, 1, 7, 0, 300))]
observe: Any = route_stats.observe


def kernel_named(variant: build.Variant) -> build.Kernel:
    """In place of a compiled one: its name is what the interpreter has to know."""
    facts = (variant.form, variant.id_bytes, variant.num_experts, variant.block_k)
    name = "_".join(map(str, ("observe", *facts, variant.block_rows, int(variant.shared))))
    return build.Kernel(
        form=variant.form, id_bytes=variant.id_bytes, shared=variant.shared,
        num_experts=variant.num_experts, block_k=variant.block_k,
        rows_per_program=variant.block_rows, max_programs=variant.max_programs,
        max_rows=variant.max_rows, name=name, num_warps=variant.num_warps, shared_bytes=0,
        code=b"interpreted",
    )  # fmt: skip


def kernels_for(shapes: set[tuple[int, int]], forms: set[int], capability: int) -> Any:
    assert capability == 90
    return [kernel_named(v) for shape in shapes for v in build.variants(*shape, forms)]


def site_in_arena(self: device.Device, layer: int) -> Any:
    return words_at(self._lanes.site_address(layer))


def words_at(address: int, kind: Any = ctypes.c_int64, dtype: torch.dtype = torch.int64) -> Any:
    """A tensor that holds an address."""
    return torch.frombuffer((kind * 8).from_address(address), dtype=dtype)


def run(name: str, arguments: list[int], programs: int) -> None:
    form, id_bytes, num_experts, block_k, block_rows, shared = map(int, name.split("_")[1:])
    data, control, totals, board, *rest, scratch, profile = arguments
    assert (scratch, profile) == (0, 0)
    kinds = {8: (ctypes.c_int64, torch.int64), 0: (ctypes.c_uint8, torch.uint8)}
    empty = rest[2] == 0  # torch gives no address where nothing is
    observe[(programs,)](
        torch.zeros(1, dtype=kinds[id_bytes][1]) if empty else words_at(data, *kinds[id_bytes]),
        *map(words_at, (control, totals, board)),
        *rest,
        FORM=form, E=num_experts, BLOCK_K=block_k, BLOCK_ROWS=block_rows, SHARED=shared, CLOCK=0,
    )  # fmt: skip


def describe(tensor: torch.Tensor, out: Any) -> None:
    """All tensors say that they are on the first device."""
    real(tensor, ctypes.byref(out))
    out.device_type, out.device_id = CUDA, 0


def real_describe() -> Any:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    address = (ctypes.c_uint64 * 7).from_address(api)[5]
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(address)


real = real_describe()


@contextmanager
def on_device(model: ToyModel, **options: Any) -> Iterator[tuple[attachment.Attachment, FakeCuda]]:
    """The model attached to as if it were on `cuda:0`."""
    cuda = FakeCuda()
    cuda.run_with(run, at_once=True)
    stream = options.pop("stream", 0)
    here, current = torch.device("cuda:0"), SimpleNamespace(cuda_stream=stream)
    patches = [
        mock.patch.object(places, "device_of", return_value=here),
        mock.patch.object(device.Device, "site", site_in_arena),
        mock.patch.object(build, "compile_clock", return_value=("read_clock", b"clock")),
        mock.patch.object(build, "compile_kernels", kernels_for),
        mock.patch.object(torch.cuda, "current_stream", return_value=current),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        graph_task = torch._C._current_graph_task_id
        faults = stack.enter_context(
            exchange(describe, stream=stream, tensor_type=torch.Tensor, graph_task=graph_task)
        )
        settings = Settings(directory=Path(stack.enter_context(TemporaryDirectory())))
        with dodoco.attach(model, settings=settings, **options) as attached:
            assert attached.uncovered == ()
            yield attached, cuda
        assert faults == []


def check_counts() -> None:
    """Exact totals, in one launch a layer and pass; then everything is given back."""
    model = ToyModel()
    plain = [model(tokens) for tokens in PASSES]
    with on_device(model) as (attached, cuda):
        with cuda.calls_made() as calls:
            seen = [model(tokens) for tokens in PASSES]
        assert calls == ["cuLaunchKernel"] * len(PASSES) * 3
        assert any(launch.programs > 1 for launch in cuda.launches())
        assert_recorded(attached, model, PASSES)
        records = attached.reader.records()
        assert len(records) == len(PASSES) * 3
        assert sorted(set(records["iteration"].tolist())) == list(range(len(PASSES)))
    for before, after in zip(plain, seen, strict=True):
        assert torch.equal(before, after)
    assert cuda.live() == NOTHING
    assert attached.reader.state == "closed"
    model(PASSES[0])
    assert_recorded(attached, model, PASSES)


def check_settings() -> None:
    model = ToyModel()
    with on_device(model) as (attached, _):
        attached.record_every = 2
        for tokens in PASSES[:2]:
            model(tokens)
        with attached.paused():
            model(PASSES[4])
        for tokens in PASSES[2:]:
            model(tokens)
        assert_recorded(attached, model, PASSES)
        assert sorted(set(attached.reader.records()["iteration"].tolist())) == [0, 4]
        attached.num_valid = 5
        model(PASSES[0])
        layer = attached.snapshot().layers[0]
        assert layer.padded == (18 - 5) * 2
        assert layer.tokens == sum(len(tokens) for tokens in PASSES) + 5


def check_placements() -> None:
    """Passes on a device carry the version of the placement, and it knows what they had counted."""
    model = ToyModel()
    with_room = partial(Recorder, placements=PlacementSpec(64, 2))
    with mock.patch.object(attachment, "Recorder", with_room), on_device(model) as (attached, _):
        experts = [*range(attached.layers[0].num_experts)]
        assert attached.recorder.record_placement({0: experts}, 1) == 0
        model(PASSES[0])
        assert attached.recorder.record_placement({0: experts[::-1]}, 1) == 1
        model(PASSES[2])
        records = attached.reader.records()
        assert records["map_version"].tolist() == [0] * 3 + [1] * 3
        found = attached.reader.placements()
        assert found is not None
        first, second = found.layers[0].kept
        assert (first.counts.sum(), second.counts.sum()) == (0, records["assignments"][0])


def check_recomputation() -> None:
    model = ToyModel()
    model.checkpointing = "non-reentrant"
    with on_device(model) as (attached, _):
        model(PASSES[0]).sum().backward()
        assert_recorded(attached, model, [PASSES[0]])
        assert [layer.recomputed for layer in attached.snapshot().layers] == [1] * 3


def check_lanes() -> None:
    """Two threads, each in a lane of its own."""
    model = ToyModel()
    with on_device(model, lanes=2) as (attached, cuda):

        def work(lane: int) -> None:
            cuda.use_device(0)
            with attached.lane(lane):
                for tokens in PASSES:
                    model(tokens)

        for lane in range(2):
            thread = threading.Thread(target=work, args=(lane,))
            thread.start()
            thread.join()
        assert_recorded(attached, model, PASSES * 2)
        assert sorted(set(attached.reader.records()["lane"].tolist())) == [0, 1]


def check_captures() -> None:
    """What is captured runs at replays; the recorder's part of it stays after detach()."""
    model = ToyModel()
    with on_device(model, stream=7) as (attached, cuda):
        model(PASSES[0])
        with cuda.capturing(7):
            model(PASSES[1])
            with pytest.raises(InputError, match="captured"):
                attached.num_valid = 3
        assert_recorded(attached, model, [PASSES[0]])
        held = cuda.live()
    assert cuda.live() == held
    captured = cuda.launches()[-1]
    before = attached.snapshot().layers[-1].passes
    run(captured.name, [*captured[5:-1], *captured.scratch], captured.programs)
    assert attached.snapshot().layers[-1].passes == before, "a replay records nothing"


if __name__ == "__main__":
    for check in sys.argv[1:]:
        globals()[f"check_{check}"]()
        print(check)
