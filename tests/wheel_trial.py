"""A trial of an installed wheel, run by `make wheel` with the interpreter of an empty environment.

It writes a recording with `_C` alone, reads it back with `Reader`, and asks the commands about it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dodoco_ext
from dodoco_ext import _C

IDS = np.array([[0, 1], [0, 2], [0, 3]], np.int64)
EXPECTED = [3, 1, 1, 1]


def write(path: Path) -> None:
    """One layer, one pass of three tokens."""
    layer = {"name": "layers.0.router", "num_experts": 4, "top_k": 2}
    writer = _C.RecordingWriter(str(path), json.dumps({"layers": [layer]}), [(4, 2)])
    site = np.zeros(_C.SITE_BYTES // 8, np.int64)
    writer.bind_site(site.ctypes.data, 0, 0)
    assert _C.route_ids(site.ctypes.data, IDS.ctypes.data, 8, *IDS.shape, 2, 1, False) == 0
    writer.close()


def command(*arguments: str, code: int = 0) -> Any:
    """What a command of the wheel prints as JSON."""
    run = [Path(sys.executable).with_name("dodoco"), *arguments, "--json"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}: {done.stderr}"
    return json.loads(done.stdout)


def main() -> None:
    """Fails by an assertion, or says what worked."""
    home = Path(dodoco_ext.__file__)
    assert home.is_relative_to(sys.prefix), f"{home} is not the wheel's"
    assert importlib.util.find_spec("torch") is None, "the environment is not empty: it has torch"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DODOCO_DIR"] = folder
        path = Path(folder) / "trial.dodoco"
        write(path)
        reader = dodoco_ext.Reader(path)
        assert reader.snapshot().layers[0].counts.tolist() == EXPECTED
        assert reader.records()["tokens"].tolist() == [3]
        assert [r["state"] for r in command("show")["recordings"]] == ["closed"]
        (layer,) = command("show", str(path), "--experts")["layers"]
        assert layer["name"] == "layers.0.router"
        found = command("doctor", code=1)  # without torch nothing can be recorded, only read
        errors = [check["name"] for check in found["checks"] if check["status"] == "error"]
        assert errors == ["torch"], errors
    cuda = f"CUDA code for {_C.cuda_archs}" if _C.has_cuda else "no CUDA code"
    print(f"wheel works: {home.parent} (format version {_C.format_version}, {cuda})")


if __name__ == "__main__":
    main()
