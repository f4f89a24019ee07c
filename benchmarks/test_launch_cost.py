"""What the host does for a pass on a GPU, up to the driver's call: timed with a driver that returns.

The driver's own time, and the GPU's, need a GPU: see benchmarks/gpu.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dodoco_ext import _C, ops
from dodoco_ext.recorder import LayerSpec, Recorder

from .figures import Figures, in_us
from .interleave import Contestant, interleave

sys.path.append(str(Path(__file__).parent.parent / "tests"))

ROWS, TOP_K, NUM_EXPERTS = 32, 8, 128


@pytest.fixture
def steps(tmp_path: Path, recordings: object) -> Any:
    """The steps by name, each a function without arguments."""
    from device_cases import OnDevice
    from fake_cuda import FakeCuda

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: benchmarks/gpu measures the whole launch")
    cuda = FakeCuda()
    on = OnDevice(tmp_path, cuda, [(NUM_EXPERTS, TOP_K)] * 48, max_bytes=4 << 20)
    cuda.be_quiet()
    site = on.lanes.site_address(5)
    numbers = (site, 0x7000, 8, ROWS, TOP_K, TOP_K, 1, False)
    recorder = Recorder([LayerSpec("gate", NUM_EXPERTS, TOP_K)])
    host_site = ops.make_site(recorder, 0)
    recorder.lane.enabled = False  # what is left is how an op reads its tensors
    ids = torch.zeros(ROWS, TOP_K, dtype=torch.int64)
    launch, nowhere = _C.launch_ids, (0, *numbers[1:])
    assert launch(*nowhere, 0) == -1
    assert launch(*numbers, 0) == launch(*numbers, 7) == 0
    yield {
        "a call of C++ with as many numbers": lambda: launch(*nowhere, 0),
        "from numbers to the driver, default stream": lambda: launch(*numbers, 0),
        "from numbers to the driver, other streams": lambda: launch(*numbers, 7),
        "an op's body reads its two tensors": lambda: ops.direct_ids(ids, host_site),
        "the same through torch's dispatcher": lambda: ops.route_ids(ids, host_site),
    }
    recorder.close()
    on.close()


def test_what_the_host_does_for_a_launch(figures: Figures, steps: dict[str, Any]) -> None:
    timings = interleave(
        {name: Contestant(run) for name, run in steps.items()},
        num_blocks=figures.blocks(400),
        block_s=1e-3,
    )
    table = figures.table(
        "Host time of a pass on a GPU before the driver, us of CPU time",
        ("step", "p20 / p50 / p80"),
    )
    for name in steps:
        cost = figures.add(f"launch/{name}", timings.time(name))
        table.rows.append((name, " / ".join(in_us(s) for s in (cost.p20, cost.p50, cost.p80))))
