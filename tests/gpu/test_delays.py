"""Programs of one launch that meet in any order, at any time: totals are exact all the same.

The delayed kernel is the shipped source with a pause of random length before every barrier, every
ticket and every read of what others added, different for every warp. What it computes is the same;
when it computes it is not. racecheck sees shared memory only, and this is for the rest.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dodoco_ext import ops, reference
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

E, K = 128, 8
SIZES = (3000, 600, 20000, 1, 65536, 1500)

DELAY = '''

@triton.jit
def _delay():
    """Up to 8 us, another time for every warp and program."""
    thread = tl.arange(0, 128)
    mixed = (thread >> 5) * 40503 + tl.program_id(0) * 30011
    mixed += (globaltimer() >> 5).to(tl.int32) * 24593
    length = (mixed ^ (mixed >> 7)) & 0x1FFF
    tl.inline_asm_elementwise(
        "nanosleep.u32 $1; mov.b32 $0, $1;", "=r,r", [length], dtype=tl.int32, is_pure=False, pack=1
    )

'''
WHERE = re.compile(r"^( +)(?=tl\.debug_barrier\(\)|ticket = tl\.atomic_add|tl\.atomic_add\()", re.M)


def delayed_source(source: str) -> tuple[str, int]:
    """The kernel's source with pauses, and how many there are."""
    paused, number = WHERE.subn(r"\1_delay()\n\1", source)
    first = paused.index("@triton.jit")
    return paused[:first] + DELAY.lstrip("\n") + "\n" + paused[first:], number


def without_barrier(source: str) -> tuple[str, int]:
    """The source without the barrier before the ticket, and how many were taken out."""
    return re.subn(r"tl\.debug_barrier\(\)\n(?= +ticket = )", "pass\n", source)


def load(source: str, path: Path) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


Install = Callable[[str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Recorders made afterwards launch the kernel of a source."""
    from dodoco_ext.triton_kernels import route_stats

    def put(source: str) -> None:
        module = load(source, tmp_path / "delayed_route_stats.py")
        monkeypatch.setattr(route_stats, "observe", module.observe)

    yield put
    sys.modules.pop("delayed_route_stats", None)


def shipped() -> str:
    from dodoco_ext.triton_kernels import route_stats

    return Path(str(route_stats.__file__)).read_text()


class Disturbance:
    """Other work on the device that keeps a changing number of multiprocessors busy."""

    def __init__(self, place: str, cuda: Any) -> None:
        self._cuda, self._streams = cuda, [cuda.Stream() for _ in range(2)]
        self._rng = np.random.default_rng(0)
        self._words = [torch.zeros(1 << 22, device=place) for _ in self._streams]

    def some(self) -> None:
        for stream, words in zip(self._streams, self._words, strict=True):
            with self._cuda.stream(stream):
                words[: int(self._rng.integers(1, 1 << 22))].mul_(1.0001)
                self._cuda._sleep(int(self._rng.integers(100, 20000)))


def wrong_totals(place: str, cuda: Any, rounds: int) -> list[str]:
    """Records many passes on two streams; names what is not as it must be."""
    recorder = Recorder([LayerSpec("router", E, K)], devices=[place], forms=["ids", "map"], lanes=2)
    assert not recorder.refused, recorder.refused
    site = ops.make_site(recorder, 0, place)
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randint(-1, E + 1, (rows, K), generator=generator) for rows in SIZES]
    maps = [torch.rand(rows, E, generator=generator) < 0.06 for rows in SIZES[:3]]
    there, there_maps = [ids.to(place) for ids in passes], [each.to(place) for each in maps]
    disturbance = Disturbance(place, cuda)
    streams = [cuda.Stream(), cuda.Stream()]
    cuda.synchronize()
    for _ in range(rounds):
        disturbance.some()
        for stream in streams:
            with cuda.stream(stream):
                for ids in there:
                    ops.route_ids(ids, site)
                for each in there_maps:
                    ops.route_map(each, site)
    cuda.synchronize()
    expected = [reference.route_ids(ids.numpy(), E) for ids in passes]
    expected += [reference.route_map(each.numpy(), E, K) for each in maps]
    repeats = rounds * len(streams)
    reader = Reader(recorder.path)
    (layer,) = reader.snapshot().layers
    wrong = []
    if not np.array_equal(layer.counts, repeats * sum(each.counts for each in expected)):
        wrong.append("counts")
    if layer.passes != repeats * len(expected):
        wrong.append("passes")
    wrong += [
        name
        for name in ("tokens", "assignments", "padded", "invalid", "capacity_dropped")
        if getattr(layer, name) != repeats * sum(getattr(each, name) for each in expected)
    ]
    # Every record by itself too: a late add would be in the next one.
    wanted = {(each.tokens, each.assignments, each.gini_numerator) for each in expected}
    names = ["tokens", "assignments", "gini_numerator"]
    found = {tuple(map(int, record)) for record in reader.records()[names].tolist()}
    if found != wanted:
        wrong.append("records")
    recorder.close()
    ops.release_site(site.data_ptr())
    return wrong


def test_totals_are_exact_whatever_the_order(
    install: Install, place: str, cuda: Any, often: int
) -> None:
    source, number = delayed_source(shipped())
    assert number >= 6, "barriers, adds and the ticket of the kernel's source are found"
    install(source)
    assert wrong_totals(place, cuda, often // 10) == []


def test_the_delays_would_show_a_missing_barrier(
    install: Install, place: str, cuda: Any, often: int, driver_decides: None
) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 8):
        pytest.skip(f"Triton {triton.__version__} puts a barrier of its own before the ticket")
    source, removed = without_barrier(shipped())
    assert removed == 1
    install(delayed_source(source)[0])
    assert {"counts", "records"} & {*wrong_totals(place, cuda, often // 10)}
