"""The hot path neither waits for the device nor allocates, and neither does attaching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import ops
from dodoco_ext.recorder import LayerSpec, Recorder
from toy import ToyModel, assert_recorded, some_tokens

pytestmark = pytest.mark.gpu


@pytest.fixture
def waiting_raises(cuda: Any) -> Iterator[None]:
    """torch raises where it would wait for the device."""
    cuda.synchronize()
    cuda.set_sync_debug_mode("error")
    yield
    cuda.set_sync_debug_mode("default")


def test_the_debug_mode_would_notice(place: str, waiting_raises: None) -> None:
    with pytest.raises(RuntimeError, match=r"synchroniz"):
        torch.arange(3, device=place).sum().item()


def test_attach_run_and_detach_never_wait(place: str, cuda: Any) -> None:
    twin, model = ToyModel(), ToyModel().to(place).eval()
    tokens = some_tokens()
    there = tokens.to(place)
    cuda.synchronize()
    cuda.set_sync_debug_mode("error")
    try:
        a = dodoco.attach(model)
        with torch.no_grad():
            for _ in range(20):
                model(there)
        with a.paused():
            model(there)
        a.record_every = 2
        a.num_valid = None
        with torch.inference_mode():
            model(there)
        # Readers look at memory, and detaching waits for the device without torch.
        passes = a.snapshot().layers[0].passes
        a.detach()
    finally:
        cuda.set_sync_debug_mode("default")
    assert 0 <= passes <= 21
    assert_recorded(a, twin, [tokens] * 21)


def test_nothing_is_allocated_after_attach(place: str, cuda: Any) -> None:
    recorder = Recorder([LayerSpec("router", 128, 8)], devices=[place], forms=["ids"])
    site = ops.make_site(recorder, 0, place)
    sizes = (1, 32, 4096, 65536)
    passes = [torch.randint(0, 128, (rows, 8), device=place) for rows in sizes]
    cuda.synchronize()
    before = cuda.memory_stats()["allocation.all.allocated"], cuda.mem_get_info()[0]
    for _ in range(50):
        for ids in passes:
            ops.route_ids(ids, site)
    cuda.synchronize()
    after = cuda.memory_stats()["allocation.all.allocated"], cuda.mem_get_info()[0]
    assert after == before, "from the first launch on: allocations by torch, bytes free"
    recorder.close()
    ops.release_site(site.data_ptr())


def test_a_model_allocates_as_much_with_probes_as_without(place: str, cuda: Any) -> None:
    model = ToyModel().to(place).eval()
    tokens = some_tokens((4, 64)).to(place)

    def allocations(times: int = 5) -> int:
        with torch.no_grad():
            model(tokens)
            before = cuda.memory_stats()["allocation.all.allocated"]
            for _ in range(times):
                model(tokens)
            return int(cuda.memory_stats()["allocation.all.allocated"] - before)

    bare = allocations()
    with dodoco.attach(model):
        assert allocations() == bare


def test_nothing_compiles_while_a_model_runs(
    place: str, cuda: Any, monkeypatch: pytest.MonkeyPatch, driver_decides: None
) -> None:
    import triton

    model = ToyModel(num_layers=2, num_experts=60, top_k=4, vocabulary=64).to(place).eval()
    with dodoco.attach(model) as a:

        def refuse(*arguments: object, **options: object) -> None:
            raise AssertionError("compiled while serving")

        monkeypatch.setattr(triton, "compile", refuse)
        with torch.no_grad():
            for rows in (1, 3, 17, 257, 5000, 70000):
                model(some_tokens((1, rows), vocabulary=64).to(place))
        cuda.synchronize()
        assert [layer.passes for layer in a.snapshot().layers] == [6, 6]
        assert a.reader.header["num_faults"] == 0


def test_recomputed_passes_count_once(place: str, cuda: Any) -> None:
    twin, model = ToyModel(), ToyModel().to(place)
    model.checkpointing = "non-reentrant"
    tokens = some_tokens()
    with dodoco.attach(model) as a:
        model(tokens.to(place)).sum().backward()
        cuda.synchronize()
        assert_recorded(a, twin, [tokens])
        assert all(layer.recomputed == 1 for layer in a.snapshot().layers)
