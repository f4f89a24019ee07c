"""`dodoco show` with --save, --since, --against, --prune and --fleet."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import planted
from dodoco_ext import cli, metrics, sampling
from dodoco_ext._C import Fault
from dodoco_ext.recorder import LayerSpec, Uncovered
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings
from dodoco_ext.snapshots import load_snapshot, save_snapshot
from dodoco_ext.views.compare import total_variation, total_variation_null
from runs import closed_rank, rank_of
from shown import Capture, show, show_json


def error(capsys: Capture, *arguments: object, code: int = cli.EXIT_ERROR) -> str:
    assert cli.run(["show", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# --- --save and --since --------------------------------------------------------------------------


@pytest.fixture
def window(tmp_path: Path) -> tuple[planted.Planted, Path]:
    """A live recording, and a snapshot of it from between two loads."""
    made = planted.Planted(planted.layers(2, 16, 2))
    made.route_all([40, 40], skew=3.0)
    saved = tmp_path / "before.json"
    save_snapshot(Reader(made.path).snapshot(), saved)
    time.sleep(0.01)
    made.route_all([32, 64, 8])
    return made, saved


def test_save_keeps_the_counters_of_the_summary(
    window: tuple[planted.Planted, Path], tmp_path: Path, capsys: Capture
) -> None:
    made, _ = window
    target = tmp_path / "now.json"
    assert f"snapshot saved: {target}" in show(capsys, made.path, "--save", target)
    found = show_json(capsys, made.path, "--save", target)
    assert found["saved"] == str(target)
    saved = load_snapshot(target)
    assert [layer.tokens for layer in saved.layers] == [
        layer["tokens"] for layer in found["layers"]
    ]
    assert saved.recording == Reader(made.path).uuid
    assert show_json(capsys, made.path)["saved"] is None


def test_since_covers_what_happened_after_the_snapshot(
    window: tuple[planted.Planted, Path], capsys: Capture
) -> None:
    made, saved = window
    found = show_json(capsys, made.path, "--since", saved, "--experts", "--ep", 4)
    reader = Reader(made.path)
    difference = reader.snapshot() - load_snapshot(saved)
    records = reader.records()
    records = records[records["time_ns"] > load_snapshot(saved).time_ns]
    assert len(records) == 6
    for layer, counted in zip(found["layers"], difference.layers, strict=True):
        assert layer["counts"] == counted.counts.tolist()
        assert (layer["passes"], layer["tokens"], layer["assignments"]) == (3, 104, 208)
        assert layer["whole_run"]["gini"] == pytest.approx(counted.gini)
        assert sum(layer["ranks"]["counts"]) == 208
        mine = records[records["layer"] == layer["index"]]
        gini = mine["gini_numerator"] / (16 * mine["assignments"])
        assert layer["per_pass"]["passes"] == 3
        assert layer["per_pass"]["gini"] == pytest.approx(gini.mean())
        assert (layer["per_pass"]["tokens_min"], layer["per_pass"]["tokens_max"]) == (8, 64)
    assert (found["ring"]["records"], found["ring"]["lost"]) == (6, 0)
    assert found["window"]["snapshot"] == str(saved)
    assert found["window"]["from_unix_ns"] == load_snapshot(saved).time_ns
    assert found["window"]["seconds"] >= 0.01
    assert "between the saved snapshot and now" in found["scope"]["whole_run"]
    out = show(capsys, made.path, "--since", saved, "--experts")
    assert "Since the snapshot, exact counts (board)" in out
    assert "Per pass, mean over the passes since the snapshot still in the ring" in out
    assert "ring: 6 records since the snapshot, none overwritten" in out
    assert "Experts, since the snapshot" in out
    assert "Whole run" not in out
    whole = show_json(capsys, made.path)
    assert whole["window"] is None
    assert whole["layers"][0]["passes"] == 5


def test_records_of_the_window_that_were_overwritten_are_counted(
    window: tuple[planted.Planted, Path], tmp_path: Path, capsys: Capture
) -> None:
    settings = Settings(Settings.from_environment().directory, max_bytes=1 << 16, run="small")
    made = planted.Planted(planted.layers(1), settings=settings)
    made.route_all([2] * 10)
    save_snapshot(Reader(made.path).snapshot(), tmp_path / "small.json")
    slots = made.recorder.num_slots
    made.route_all([2] * (slots + 9))
    ring = show_json(capsys, "small", "--since", tmp_path / "small.json")["ring"]
    assert (ring["records"], ring["lost"]) == (slots, 9)


def test_since_the_snapshot_nothing_may_have_happened(tmp_path: Path, capsys: Capture) -> None:
    path = planted.recording(planted.layers(2))
    show(capsys, path, "--save", tmp_path / "a.json")
    found = show_json(capsys, path, "--since", tmp_path / "a.json")
    assert [layer["passes"] for layer in found["layers"]] == [0, 0]
    assert found["layers"][0]["whole_run"]["gini"] is None
    out = show(capsys, path, "--since", tmp_path / "a.json")
    assert "no records in the ring since the snapshot" in out
    assert "nan" not in out


def test_a_record_whose_count_came_before_the_snapshot_is_no_crash(
    tmp_path: Path, capsys: Capture
) -> None:
    """The clock says after, the board before: records without a load to take their noise at."""
    path = planted.recording(planted.layers(2))
    data = tmp_path / "a.json"
    show(capsys, path, "--save", data)
    content = json.loads(data.read_text())
    content["time_ns"] = content["start_ns"]
    data.write_text(json.dumps(content))
    found = show_json(capsys, path, "--since", data)
    assert [layer["passes"] for layer in found["layers"]] == [0, 0]
    assert found["layers"][0]["per_pass"]["passes"] == 3
    assert found["ring"]["lost"] == 0


def test_since_refuses_the_snapshot_of_another_recording(tmp_path: Path, capsys: Capture) -> None:
    paths = [planted.recording(planted.layers(1)) for _ in range(2)]
    saved = tmp_path / "a.json"
    show(capsys, paths[0], "--save", saved)
    message = error(capsys, paths[1], "--since", saved)
    uuids = [Reader(path).uuid[:8] for path in paths]
    assert f"{saved} is of recording {uuids[0]}, not of {uuids[1]}" in message


@pytest.mark.parametrize("option", ["--since", "--against"])
def test_a_broken_snapshot_is_one_line(option: str, tmp_path: Path, capsys: Capture) -> None:
    path = planted.recording(planted.layers(1))
    saved = tmp_path / "a.json"
    saved.write_text('{"schema": "dodoco.snapshot/1", "recording": 7}')
    assert f"{saved} is not a saved snapshot: recording is 7" in error(capsys, path, option, saved)


def test_a_recording_is_not_overwritten_by_a_snapshot(capsys: Capture) -> None:
    path = planted.recording(planted.layers(1))
    assert "no saved snapshot: give another name" in error(capsys, path, "--save", path)
    assert len(Reader(path).records()) == 3


# --- --against -----------------------------------------------------------------------------------


def test_two_recordings_side_by_side(capsys: Capture) -> None:
    a = planted.recording(planted.layers(3, 16, 2), [100], skew=2.0)
    b = planted.recording(planted.layers(3, 16, 2), [300, 20])
    found = show_json(capsys, a, "--against", b)
    assert (found["a"]["source"], found["b"]["source"]) == (str(a), str(b))
    for layer, x, y in zip(
        found["layers"], Reader(a).snapshot().layers, Reader(b).snapshot().layers, strict=True
    ):
        assert (layer["a"]["tokens"], layer["b"]["tokens"]) == (100, 320)
        assert layer["a"]["gini"] == pytest.approx(x.gini)
        assert layer["b"]["max_over_mean"] == pytest.approx(y.max_over_mean)
        assert layer["gini_difference"] == pytest.approx(x.gini - y.gini)
        assert layer["max_over_mean_difference"] == pytest.approx(x.max_over_mean - y.max_over_mean)
        shares = x.counts / x.counts.sum() - y.counts / y.counts.sum()
        assert layer["distance"] == pytest.approx(np.abs(shares).sum() / 2)
        assert layer["distance"] > layer["distance_null"]["high"]
    mean = np.mean([layer["distance"] for layer in found["layers"]])
    assert found["mean_of_layers"]["distance"] == pytest.approx(mean)
    out = show(capsys, a, "--against", b)
    assert f"A  recording {a}" in out
    assert f"B  recording {b}" in out
    assert "tokens a layer: 100 and 320" in out
    assert "layers: model.layers.*.mlp.gate" in out
    assert "nan" not in out


def test_a_saved_snapshot_can_be_either_side(
    window: tuple[planted.Planted, Path], capsys: Capture
) -> None:
    made, saved = window
    forth = show_json(capsys, made.path, "--against", saved)
    back = show_json(capsys, saved, "--against", made.path)
    assert (forth["a"]["saved"], forth["b"]["saved"]) == (False, True)
    first, second = forth["layers"][0], back["layers"][0]
    assert first["gini_difference"] == pytest.approx(-second["gini_difference"])
    assert first["distance"] == pytest.approx(second["distance"])
    assert forth["b"]["to_unix_ns"] == load_snapshot(saved).time_ns
    assert "A and B are of one recording" in show(capsys, made.path, "--against", saved)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (planted.layers(3), r"3 layers (top 2 of 8)"),
        (planted.layers(2, 16), r"2 layers (top 2 of 16)"),
        (planted.layers(2, 8, 4), r"2 layers (top 4 of 8)"),
    ],
)
def test_models_of_other_shapes_are_refused(
    other: list[LayerSpec], words: str, capsys: Capture
) -> None:
    a, b = planted.recording(planted.layers(2)), planted.recording(other)
    message = error(capsys, a, "--against", b)
    assert f"{a} has 2 layers (top 2 of 8)" in message
    assert words in message


def test_layers_of_other_names_are_matched_by_place(capsys: Capture) -> None:
    a = planted.recording([LayerSpec("gate", 8, 2)])
    b = planted.recording([LayerSpec("router", 8, 2)])
    (layer,) = show_json(capsys, a, "--against", b)["layers"]
    assert (layer["a"]["name"], layer["b"]["name"]) == ("gate", "router")
    assert "layers have other names in B" in show(capsys, a, "--against", b)


def test_without_top_k_or_counts_there_is_no_null(capsys: Capture) -> None:
    a = planted.recording([LayerSpec("gate", 8, 0)])
    b = planted.Planted([LayerSpec("gate", 8, 0)]).close()
    (layer,) = show_json(capsys, a, "--against", b)["layers"]
    assert layer["distance"] is None
    assert layer["b"]["gini"] is None
    assert layer["gini_difference"] is None
    assert layer["distance_null"] == {"mean": None, "low": None, "high": None}
    assert "nan" not in show(capsys, a, "--against", b)


def test_total_variation() -> None:
    assert total_variation(np.array([1, 1]), np.array([30, 30])) == 0
    assert total_variation(np.array([5, 0]), np.array([0, 2])) == 1
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)
    assert math.isnan(total_variation(np.array([0, 0]), np.array([1, 1])))


@pytest.mark.parametrize("skew", [0.0, 2.0])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens"),
    [
        *((2, 1, (50, 80)), (3, 1, (40, 40)), (8, 2, (20, 400)), (8, 7, (100, 30))),
        *((64, 6, (64, 64)), (64, 6, (5000, 700)), (128, 8, (2000, 10))),
    ],
)
def test_the_null_of_a_distance_equals_direct_simulation(
    num_experts: int, top_k: int, tokens: tuple[int, int], skew: float
) -> None:
    """Against routers that pick k distinct experts, drawn exactly."""
    rng = np.random.default_rng(1)
    weights = skew * np.linspace(-1, 1, num_experts)
    draws = [sampling.sample_counts(rng, t, num_experts, top_k, 2000, weights) for t in tokens]
    exact = np.array([total_variation(x, y) for x, y in zip(*draws, strict=True)])
    # The loads as they are: those that one pair of recordings shows scatter themselves.
    loads = sampling.inclusion_probabilities(weights, top_k)
    null = total_variation_null(loads * tokens[0], loads * tokens[1], top_k)
    assert null.mean == pytest.approx(exact.mean(), rel=0.04, abs=0.002)
    inside = np.mean((exact >= null.low) & (exact <= null.high))
    # Of two experts a distance takes few values; of ten tokens over 128 experts the form is rough.
    assert 0.88 < inside < 0.995


def test_a_router_that_leaves_no_choice_has_no_distance() -> None:
    same = np.array([40, 40, 0, 0])
    assert total_variation_null(same, same // 2, 2).high == 0
    assert math.isnan(total_variation_null(same, same * 0, 2).mean)


def test_a_null_takes_counts_of_any_size() -> None:
    huge = np.full(8, (1 << 64) - 1, np.uint64)
    assert total_variation_null(huge, huge, 2).high < 1e-6


# --- --fleet -------------------------------------------------------------------------------------


def test_a_run_and_a_folder_mean_all_ranks_and_a_file_one(
    recordings: Path, tmp_path: Path, capsys: Capture
) -> None:
    paths = [closed_rank(rank, 2) for rank in range(2)]
    for source in ("job", recordings):
        found = show_json(capsys, source)
        assert (found["schema"], len(found["ranks"])) == ("dodoco.fleet/1", 2)
    for source in (paths[0], paths[0].name):
        assert show_json(capsys, source)["recording"]["path"] == str(paths[0])
    # Of one rank there is more to say.
    saved = tmp_path / "saved.json"
    assert show_json(capsys, "job", "--save", saved)["recording"]["path"] in map(str, paths)
    for path in paths:
        path.unlink()
    assert show_json(capsys, closed_rank(0, 1).parent)["schema"] == "dodoco.summary/1"


def test_a_fleet_is_summed_and_its_gaps_are_named(recordings: Path, capsys: Capture) -> None:
    restarted = closed_rank(1, 4)
    closed_rank(0, 4, [5, 3])
    closed_rank(1, 4, [8])
    os.truncate(closed_rank(3, 4), 8192)
    found = show_json(capsys, "job", "--fleet", "--experts", "--ep", 2)
    assert (found["schema"], found["run"], found["world_size"]) == ("dodoco.fleet/1", "job", 4)
    assert [(r["rank"], r["tokens"], r["passes"]) for r in found["ranks"]] == [(0, 8, 2), (1, 8, 1)]
    assert [(m["rank"], m["state"]) for m in found["missing"]] == [(2, "missing"), (3, "truncated")]
    assert [s["path"] for s in found["superseded"]] == [str(restarted)]
    counts = [Reader(rank["path"]).snapshot().counts for rank in found["ranks"]]
    for index, layer in enumerate(found["layers"]):
        summed = counts[0][index] + counts[1][index]
        assert layer["counts"] == summed.tolist()
        assert layer["whole_run"]["gini"] == pytest.approx(float(metrics.gini(summed)))
        assert layer["whole_run"]["gini_null"]["mean"] > 0
        assert layer["ranks"]["counts"] == [int(summed[:4].sum()), int(summed[4:].sum())]
        assert (layer["tokens"], layer["summed_ranks"]) == (16, [0, 1])
    assert found["aligned"] == {"groups": 4, "complete": 2, "iterations": 2, "left_out": 0}
    assert found["tokens_max_over_mean"] == 1.0
    out = show(capsys, "job", "--fleet", "--experts", "--ep", 2)
    for text in (
        "run job: 2 of 4 ranks",
        "MISSING: no recording of rank 2",
        "NOT READ: rank 3 (truncated): ",
        f"not counted: {restarted} (rank 1, closed): its rank was restarted",
        "Whole run, all ranks read, exact counts (board): top 2 of 8 experts",
        "rings: 2 of 4 passes",
        "Experts, whole run, all ranks read",
        "2 ranks, assuming equal contiguous runs of experts",
    ):
        assert text in out, text


def test_what_a_rank_does_not_observe_and_its_faults_are_shown(capsys: Capture) -> None:
    for rank in range(2):
        settings = Settings(
            Settings.from_environment().directory, run="job", rank=rank, world_size=2
        )
        uncovered = [Uncovered("mtp.gate", "fused kernel")]
        made = planted.Planted(planted.layers(1), uncovered=uncovered, settings=settings)
        if rank == 1:
            made.recorder.add_fault(Fault.BAD_SHAPE)
        made.close()
    out = show(capsys, "--fleet")
    assert "NOT OBSERVED: mtp.gate: fused kernel (rank 0 to 1)" in out
    assert "FAULTS: 1 in rank 1" in out
    assert "nan" not in out


def test_a_fleet_without_a_name_says_how_to_get_one(capsys: Capture) -> None:
    closed_rank(0, 2, run="20261124-101530")
    assert "set DODOCO_RUN" in show(capsys, "--fleet", "--latest")


def test_a_fleet_of_two_worlds_is_refused(capsys: Capture) -> None:
    paths = [closed_rank(0, 2), closed_rank(1, 3)]
    message = error(capsys, "job", "--fleet")
    assert all(str(path) in message for path in paths)


# --- --prune -------------------------------------------------------------------------------------


def test_prune_removes_what_ended_but_the_last_two_of_each_rank(
    recordings: Path, capsys: Capture
) -> None:
    live = rank_of(0, 2, run="live")
    renamed = closed_rank(0, 2, run="mine").rename(recordings / "precious.dodoco")
    dead = planted.dead_recording(recordings)
    elsewhere = (
        recordings / "elsewhere"
    )  # the recorder prunes too: what is closed is moved here later
    elsewhere.mkdir()
    closed: dict[int, list[Path]] = {0: [], 1: []}
    for rank, paths in closed.items():
        for _ in range(3):
            path = closed_rank(rank, 2)
            paths.append(path.rename(elsewhere / path.name))
    for age, path in enumerate(reversed([*closed[0], *closed[1]])):
        os.utime(path.rename(recordings / path.name), (time.time() - 1000 - age,) * 2)
    for path in (dead, renamed):
        os.utime(path, (1, 1))
    expected = {dead.name, closed[0][0].name, closed[1][0].name}

    found = show_json(capsys, "--prune")
    assert found["schema"] == "dodoco.pruned/1"
    assert {Path(path).name for path in found["removed"]} == expected
    left = {path.name for path in recordings.glob("*.dodoco")}
    assert left == {live.path.name, renamed.name} | {
        path.name for rank in closed for path in closed[rank][1:]
    }
    out = show(capsys, "--prune")
    assert out == f"removed nothing from {recordings}\n"
    live.close()


def test_prune_says_what_it_removed(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "other"
    paths = [
        planted.Planted(
            planted.layers(1), settings=Settings(tmp_path / str(i), run=f"r{i}")
        ).close()
        for i in range(3)
    ]
    folder.mkdir()
    for age, path in enumerate(paths):
        moved = path.rename(folder / path.name)
        os.utime(moved, (time.time() - age,) * 2)
    out = show(capsys, "--prune", folder)
    assert out == f"removed {folder / paths[2].name}\nremoved 1 recording from {folder}\n"


# --- Usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--save", "x"], "--save needs a recording"),
        (["--since", "x"], "--since needs a recording"),
        (["--prune", "--latest"], "give --prune or --latest, not both"),
        (["--prune", "--list"], "not both"),
        (["--prune", "nonsense"], "--prune takes a folder; nonsense is none"),
        (["--fleet", "--since", "x"], "give --fleet or --since, not both"),
        (["--fleet", "--save", "x"], "give --fleet or --save, not both"),
        (["a", "--against", "b", "--ep", "2"], "give --against or --ep, not both"),
        (["a", "--against", "b", "--since", "c"], "give --against or --since, not both"),
        (["--list", "--fleet"], "not both"),
    ],
)
def test_what_makes_no_sense_together(arguments: list[str], named: str, capsys: Capture) -> None:
    assert named in error(capsys, *arguments, code=cli.EXIT_USAGE)


def test_none_of_it_loads_torch_or_a_writer(recordings: Path, tmp_path: Path) -> None:
    path, saved = closed_rank(0, 1), tmp_path / "a.json"
    uses = [
        *(["--fleet"], [str(path), "--save", str(saved)], [str(path), "--since", str(saved)]),
        *(["job", "--against", str(saved)], ["--prune"]),
    ]
    script = (
        "import sys\nfrom dodoco_ext.cli import run\n"
        f"assert [run(['show', *use]) for use in {uses!r}] == [0] * {len(uses)}\n"
        "print(' '.join(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "dodoco_ext.pruning" in loaded
    heavy = {
        "torch",
        "triton",
        "pandas",
        "pyarrow",
        "scipy",
        "dodoco_ext.recorder",
        "dodoco_ext.ops",
    }
    assert loaded & heavy == set()
