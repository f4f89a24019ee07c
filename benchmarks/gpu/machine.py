"""What the check ran on: GPU, driver, versions and tools, without host names and paths."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version

from .results import Results
from .step import find_tool

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "dodoco-ext")


def main(dry: bool, effort: float, results: Results) -> int:
    """Stores what can be found out; without a GPU that is what is said."""
    import torch

    import dodoco_ext

    results.forget("not there")
    for package in PACKAGES:
        try:
            results.put(package, version(package))
        except PackageNotFoundError:
            results.put(package, None)
    results.put("dodoco-ext", dodoco_ext.__version__)
    for tool, pattern in (
        ("nvcc", r"release ([\d.]+)"),
        ("compute-sanitizer", r"[Vv]ersion ([\d.]+)"),
    ):
        results.put(tool, _version_of(tool, pattern))
    if not torch.cuda.is_available():
        results.put("gpus", 0)
        results.put("summary" if dry else "not there", "torch finds no GPU")
        return 0
    properties = torch.cuda.get_device_properties(0)
    results.put("gpu", properties.name)
    results.put("gpus", torch.cuda.device_count())
    results.put("compute capability", f"{properties.major}.{properties.minor}")
    results.put("multiprocessors", properties.multi_processor_count)
    results.put("memory_gib", round(properties.total_memory / 2**30, 1))
    results.put("cuda of torch", torch.version.cuda)
    results.put("driver", _driver())
    results.put("summary", f"{properties.name}, torch {torch.__version__}, driver {_driver()}")
    return 0


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(command) or "").partition("\n")[0].strip() or None


def _version_of(tool: str, pattern: str) -> str | None:
    path = find_tool(tool)
    found = re.search(pattern, _output([path, "--version"]) or "") if path else None
    return found.group(1) if found else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
