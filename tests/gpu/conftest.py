"""What tests on a GPU share. Without one they are skipped, unless DODOCO_GPU_DRY=1 runs them on the CPU.

Dry, `torch.cuda` is imitated (benchmarks/gpu/stand_in.py): that proves the tests' own logic, nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DRY = os.environ.get("DODOCO_GPU_DRY") == "1"
STAND_IN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "stand_in.py"


def _why_not() -> str:
    if DRY:
        return ""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch finds none"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := _why_not()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cuda() -> Any:
    """`torch.cuda`, or its stand-in."""
    if not DRY:
        import torch

        return torch.cuda
    spec = importlib.util.spec_from_file_location("dodoco_stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def place() -> str:
    """Where models and recordings of these tests are."""
    if not DRY:
        return "cuda:0"
    import torch

    torch.set_num_threads(1)
    return "cpu"


@pytest.fixture(scope="session")
def often() -> int:
    """Repetitions of what must be repeated often to mean something; dry, it means nothing."""
    return 40 if DRY else 1000


@pytest.fixture
def driver_decides() -> None:
    """For tests of what only a driver does: they have no dry run."""
    if DRY:
        pytest.skip("nothing stands in for the driver: tests/test_device_*.py")


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in shared memory: the driver pins no file of a disk."""
    for name in ("DODOCO_RUN", "DODOCO_RANK", "DODOCO_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="dodoco-gpu-", dir="/dev/shm") as folder:
        monkeypatch.setenv("DODOCO_DIR", folder)
        yield Path(folder)


@pytest.fixture(autouse=True)
def nothing_pending(cuda: Any) -> Iterator[None]:
    """A test's own failure, not the next one's, where a kernel failed."""
    yield
    cuda.synchronize()


@pytest.fixture
def capture(cuda: Any) -> Callable[..., Any]:
    """`capture(run, stream)`: warms up and captures `run()` on one stream; gives the graph."""

    def make(run: Callable[[], object], stream: Any, warm_ups: int = 2) -> Any:
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(warm_ups):
                run()
        stream.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream):
            run()
        cuda.current_stream().wait_stream(stream)
        return graph

    return make
