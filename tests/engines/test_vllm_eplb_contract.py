"""vLLM's load balancer, as far as it is relied on: in its sources, and run on the CPU with stand-in groups."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

import dodoco_ext
from dodoco_ext.vllm_versions import CHECKED
from vllm_sources import source_of, tree_of, vllm_python

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


@pytest.fixture(params=CHECKED)
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
    writers = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and writes_a_map(function)
    }
    # Where ranks join or leave; a rearrangement follows.
    scaling = {"update_mapping", "reconfigure_physical_expert_slots"}
    # They change the window of loads in place, and the maps that follow from this one.
    others = {"rearrange", "compute_logical_maps"}
    assert writers == {*FUNCTIONS, *scaling, *others}


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("state.physical_to_logical_map = new", True),
        ("other, state.physical_to_logical_map[layer] = new", True),
        ("state.physical_to_logical_map_buffer[:, slots] += new", True),
        ("state.physical_to_logical_map.fill_(-1)", True),
        ("old = state.physical_to_logical_map[layer]", False),
        ("window.copy_(new)", False),
    ],
)
def test_a_writer_of_a_map_is_recognised(line: str, writes: bool) -> None:
    assert writes_a_map(ast.parse(line)) == writes


def writes_a_map(function: ast.AST) -> bool:
    """Whether a map is set, or it is named where any tensor is changed in place."""
    nodes = list(ast.walk(function))
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in nodes if isinstance(n, ast.AugAssign | ast.AnnAssign)]
    flat = [each for t in targets for each in ast.walk(t)]
    if any(
        isinstance(t, ast.Attribute | ast.Subscript)
        and isinstance(t.ctx, ast.Store)
        and "physical_to_logical" in ast.unparse(t)
        for t in flat
    ):
        return True
    called = [n.func for n in nodes if isinstance(n, ast.Call)]
    in_place = [c for c in called if isinstance(c, ast.Attribute) and c.attr.endswith("_")]
    return bool(in_place) and "physical_to_logical" in ast.dump(function)


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
