"""Compiles variants of the kernel under one Triton, without a GPU. Run by farm.py in a process of its own.

    python compile_variants.py JOBS OUT

JOBS is a JSON file: the version of Triton that has to be the one found, the folder that holds the
package `dodoco_ext` whose kernel is compiled, and what to compile. OUT becomes a JSON list with one
entry a variant and target: what the compiler, `cuobjdump` and `nvdisasm` say of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

RESOURCES = re.compile(r"([A-Z]+):(\d+)")


def target_of(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def kind_of(spec: Any) -> str:
    return f"ids{8 * spec.id_bytes}" if spec.form == 0 else ("map", "bits")[spec.form - 1]


def path_of(spec: Any) -> str:
    return "shared" if spec.shared else "alone"


def tool(name: str, *arguments: str) -> str:
    """Runs one of the tools that Triton brings along."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def described(made: Any, target: str) -> dict[str, Any]:
    """What the compiler and the tools say of one compiled kernel."""
    name = made.metadata.name
    entry: dict[str, Any] = {
        "kernel": name,
        "num_warps": made.metadata.num_warps,
        "shared_bytes": made.metadata.shared,
    }
    if target.startswith("gfx"):
        return {**entry, "code": made.asm["amdgcn"], "resources": {}, "ptx": ""}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        code = tool("nvdisasm", "-g", "-c", cubin.name)
    _, _, of_kernel = usage.partition(f"Function {name}:")
    resources = {
        key: int(value) for key, value in RESOURCES.findall(of_kernel.split("Function")[0])
    }
    return {**entry, "code": code, "resources": resources, "ptx": made.asm["ptx"]}


def compile_all(jobs: dict[str, Any]) -> list[dict[str, Any]]:
    if triton.__version__.split("+")[0] != jobs["triton"]:
        raise SystemExit(f"Triton {triton.__version__} was found, not {jobs['triton']}")
    from dodoco_ext.triton_kernels import build

    if Path(jobs["package"]) not in Path(build.__file__).parents:
        raise SystemExit(f"{build.__file__} was imported, not the package in {jobs['package']}")
    source = Path(build.__file__).with_name("route_stats.py").read_text()
    compiled = []
    for want in jobs["wanted"]:
        forms = {
            0 if kind.startswith("ids") else ("map", "bits").index(kind) + 1
            for kind in want["kinds"]
        }
        for spec in build.variants(want["num_experts"], want["top_k"], forms):
            if kind_of(spec) not in want["kinds"] or path_of(spec) not in want["paths"]:
                continue
            for target in want["targets"]:
                made = build.compile_variant(spec, target_of(target))
                entry = described(made, target)
                entry.update(
                    source=source,
                    triton=jobs["triton"],
                    target=target,
                    kind=kind_of(spec),
                    path=path_of(spec),
                    num_experts=spec.num_experts,
                    top_k=want["top_k"],
                )
                compiled.append(entry)
    return compiled


if __name__ == "__main__":
    result = compile_all(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
