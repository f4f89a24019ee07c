"""vLLM's load balancer, as far as it is relied on: in its sources, and run on the CPU with stand-in groups."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import zipfile
from functools import cache
from pathlib import Path

import pytest

import dodoco_ext
from test_zoo_deepseek_vllm import vllm_python

pytestmark = pytest.mark.engine

PACKAGE = Path(dodoco_ext.__file__).parent.parent
FUNCTIONS = {
    "_commit_eplb_maps": ["model_state", "new_physical_to_logical_map"],
    "_commit_eplb_maps_for_layer": ["model_state", "new_physical_to_logical_map", "layer"],
}
FIELDS = {
    "distributed/eplb/eplb_state.py": {
        "EplbModelState": {"model"},
        "EplbLayerState": {"logical_to_physical_map", "expert_load_view"},
    },
    "model_executor/models/interfaces.py": {
        "MixtureOfExperts": {"moe_layers", "num_local_physical_experts"}
    },
    "model_executor/layers/fused_moe/config.py": {
        "FusedMoEConfig": {"num_experts", "num_local_experts", "num_logical_experts"}
    },
}


@cache
def source_of(release: str, file: str) -> str:
    """A file of vLLM: of the one that is installed, or out of a wheel in `VLLM_WHEELS`."""
    if release == "installed":
        code = (
            "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
        )
        found = subprocess.check_output([vllm_python(), "-c", code], text=True, timeout=60)
        return (Path(found.strip()) / file).read_text()
    home = os.environ.get("VLLM_WHEELS", "")
    wheels = sorted(Path(home).glob(f"vllm-{release}-*.whl")) if home else []
    if not wheels:
        pytest.skip(f"no wheel of vllm {release} in VLLM_WHEELS")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(f"vllm/{file}").decode()


def tree_of(release: str, file: str) -> ast.Module:
    return ast.parse(source_of(release, file))


@pytest.fixture(params=["installed", "0.33.0"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_functions_that_commit_maps_take_what_is_handed_on(release: str) -> None:
    tree = tree_of(release, "distributed/eplb/eplb_state.py")
    found = {n.name: n.args for n in tree.body if isinstance(n, ast.FunctionDef)}
    for name, arguments in FUNCTIONS.items():
        assert [a.arg for a in found[name].args] == arguments
        assert not found[name].kwonlyargs


def test_only_what_is_known_writes_a_layers_map(release: str) -> None:
    """A third place that changed `physical_to_logical_map` would change it without being recorded."""
    tree = tree_of(release, "distributed/eplb/eplb_state.py")
    writers = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
            copies = [c.func for c in calls if isinstance(c.func, ast.Attribute)]
            if any(c.attr == "copy_" for c in copies) and "physical_to_logical" in ast.dump(
                function
            ):
                writers.add(function.name)
    # update_mapping(): of a rank that joins; a rearrangement follows. step(): the window of loads.
    assert writers - set(FUNCTIONS) <= {"update_mapping", "step"}


def test_the_rule_that_chooses_a_replica_is_the_documented_one(release: str) -> None:
    """docs/placements.md says how it differs from an even split; tests/test_placements.py computes it."""
    source = source_of(release, "model_executor/layers/fused_moe/router/base_router.py")
    for line in (
        "KNUTH_MULTIPLIER = 2654435769",
        "token_idx = (offs // num_active_experts).to(tl.int64)",
        "hashed = (token_idx * KNUTH_MULTIPLIER) & 0xFFFFFFFF",
        "replica_idx = hashed % replica_count",
    ):
        assert line in source


@pytest.mark.parametrize("file", FIELDS)
def test_the_fields_are_there(file: str, release: str) -> None:
    classes = {n.name: n for n in tree_of(release, file).body if isinstance(n, ast.ClassDef)}
    for name, wanted in FIELDS[file].items():
        body = classes[name].body
        found = {
            n.target.id for n in body if isinstance(n, ast.AnnAssign) and hasattr(n.target, "id")
        }
        assert wanted <= found


def test_what_vllm_commits_is_what_is_recorded(tmp_path: Path) -> None:
    environment = {**os.environ, "DODOCO_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE)}
    program = Path(__file__).with_name("vllm_eplb.py")
    ended = subprocess.run(
        [vllm_python(), str(program)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    start, together, first, second = found["committed"]
    assert found["faults"] == 0
    for layer, entries in enumerate(found["recorded"]):
        later = {0: [(2, first)], 1: [], 2: [(3, second)]}[layer]
        wanted = [(0, start), (1, together), *later]
        assert entries == [[version, 4, maps[layer]] for version, maps in wanted]
    assert all(5 in set(maps) for maps in together)
    assert together[0].count(5) > 1, "the busiest expert got replicas"
