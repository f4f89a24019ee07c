"""`dodoco show`: the listing, and a summary whose figures equal those computed from the counts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import planted
from dodoco_ext import cli, metrics, nulls
from dodoco_ext import open as open_recording
from dodoco_ext._C import Fault
from dodoco_ext.recorder import LayerSpec, Uncovered
from dodoco_ext.settings import Settings
from dodoco_ext.views.null_curve import MAX_SIMULATED

Capture = pytest.CaptureFixture[str]


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def show_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """What `dodoco show ... --json` prints; NaN is refused."""
    assert cli.run(["show", *map(str, arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def show(capsys: Capture, *arguments: object) -> str:
    """What `dodoco show ...` prints."""
    assert cli.run(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# --- The listing ---------------------------------------------------------------------------------


def test_no_recordings(recordings: Path, capsys: Capture) -> None:
    out = show(capsys)
    assert f"no recordings in {recordings}" in out
    assert "attach(model)" in out
    assert show_json(capsys) == {
        "schema": "dodoco.recordings/2",
        "folders": [str(recordings)],
        "recordings": [],
    }


def test_every_state_is_listed(recordings: Path, capsys: Capture) -> None:
    planted.recording(planted.layers(2), [5], labels={"model_name": "closed-model"})
    live = planted.Planted(planted.layers(3), labels={"model_name": "live-model"})
    live.route_all([7, 4])
    dead = planted.dead_recording(recordings)
    (recordings / "broken.r00000.00.dodoco").write_bytes(b"\0" * 8192)
    (recordings / "notes.r00000.00.dodoco").write_text("no recording" * 1000)
    os.truncate(planted.recording(planted.layers(1)), 8192)
    later = planted.recording(planted.layers(1))
    data = bytearray(later.read_bytes())
    data[8] = 99
    later.write_bytes(data)

    found = {r["state"]: r for r in show_json(capsys)["recordings"]}
    readable = {"live", "closed", "dead"}
    assert set(found) == {*readable, "unfinished", "foreign", "truncated", "version"}
    assert found["live"]["model"] == "live-model"
    assert (found["live"]["layers"], found["live"]["tokens"]) == (3, 11)
    assert found["live"]["closed_unix_ns"] is None
    assert (found["closed"]["layers"], found["closed"]["tokens"]) == (2, 5)
    assert found["closed"]["duration_s"] >= 0
    assert found["dead"]["path"] == str(dead)
    assert found["dead"]["duration_s"] is None
    assert all((r["problem"] is None) == (state in readable) for state, r in found.items())
    assert len({tuple(r) for r in found.values()}) == 1, "every entry has the same keys"

    out = show(capsys)
    assert f"{recordings}: 7 recordings" in out
    for name in ("live-model", "closed-model", dead.name):
        assert name in out
    for state in set(found) - readable:
        assert f"{state}: {recordings}" in out.replace("\n", " ")
    live.close()


def test_a_folder_is_listed_or_means_its_latest(tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    planted.Planted(planted.layers(1), settings=Settings(directory=other, run="first")).close()
    assert show_json(capsys)["recordings"] == []
    assert [r["run"] for r in show_json(capsys, "--list", other)["recordings"]] == ["first"]
    assert show_json(capsys, other)["recording"]["run"] == "first"


@pytest.mark.usefixtures("recordings")
def test_every_source_means_the_same_recording(capsys: Capture) -> None:
    path = planted.recording(planted.layers(1))
    found = open_recording(path)
    sources = (path, path.name, path.name.split(".")[0], found.header["owner_pid"], path.parent)
    for source in (*sources, "--latest"):
        assert show_json(capsys, source)["recording"]["path"] == str(path)


# --- The summary ---------------------------------------------------------------------------------


def test_counters_and_whole_run_figures_are_exact(capsys: Capture) -> None:
    made = planted.Planted([LayerSpec("gate", 4, 2)])
    made.route(0, [[0, 1], [0, 2], [0, -1], [-1, -1], [0, 9]])
    made.route(0, [[0, 1]])
    found = show_json(capsys, made.close(), "--experts")
    (layer,) = found["layers"]
    counts = [5, 2, 1, 0]
    assert layer["counts"] == counts
    assert (layer["passes"], layer["tokens"], layer["assignments"]) == (2, 5, 8)
    assert (layer["padded"], layer["invalid"], layer["capacity_dropped"]) == (3, 1, 0)
    run = layer["whole_run"]
    assert run["gini"] == pytest.approx(float(metrics.gini(counts)))
    assert run["max_over_mean"] == pytest.approx(2.5)
    assert run["unused_experts"] == 1
    # Eight assignments at two a token: what four tokens would make.
    exact = nulls.null(4, 4, 2)
    assert run["gini_null"]["mean"] == pytest.approx(exact.gini_mean)
    assert run["max_over_mean_null"]["high"] == pytest.approx(exact.max_over_mean_high)


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_per_pass_figures_are_those_of_the_records(skew: float, capsys: Capture) -> None:
    path = planted.recording(planted.layers(2, 16, 2), [32, 32, 8, 32, 64, 64] * 5, skew=skew)
    found = show_json(capsys, path)
    reader = open_recording(path)
    records, snapshot = reader.records(), reader.snapshot()
    for layer in found["layers"]:
        mine = records[records["layer"] == layer["index"]]
        gini = mine["gini_numerator"] / (16 * mine["assignments"])
        exact = [nulls.null(int(t), 16, 2) for t in mine["tokens"]]
        each = layer["per_pass"]
        assert each["passes"] == 30
        assert (each["tokens_min"], each["tokens_max"]) == (8, 64)
        assert each["gini"] == pytest.approx(gini.mean())
        assert each["gini_null"] == pytest.approx(np.mean([n.gini_mean for n in exact]))
        loads = snapshot.layers[layer["index"]].counts
        corrected = nulls.corrected_gini(gini, mine["tokens"], 16, 2, counts=loads)
        assert each["gini_corrected"] == pytest.approx(corrected)
        assert (corrected > 0) == (skew > 0)
        peaks = np.mean(16 * mine["max_count"] / mine["assignments"])
        assert each["max_over_mean"] == pytest.approx(peaks)
        peak_null = np.mean([n.max_over_mean_mean for n in exact])
        assert each["max_over_mean_null"] == pytest.approx(peak_null)
    means = [layer["per_pass"]["gini"] for layer in found["layers"]]
    assert found["mean_of_layers"]["pass_gini"] == pytest.approx(np.mean(means))
    assert found["ring"]["null_sizes"] == [3, 3]


def test_many_pass_sizes_cost_a_handful_of_simulations(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked = set()
    simulate = nulls.null

    def counted(num_tokens: int, *arguments: Any) -> nulls.Null:
        asked.add(num_tokens)
        return simulate(num_tokens, *arguments)

    monkeypatch.setattr(nulls, "null", counted)
    path = planted.recording(planted.layers(3, 8, 2), list(range(1, 120)))
    found = show_json(capsys, path)
    assert found["ring"]["null_sizes"] == [119, MAX_SIMULATED]
    assert len(asked) == MAX_SIMULATED + 1, "the pass sizes, and the whole run"
    assert f"at {MAX_SIMULATED} of 119 pass sizes" in show(capsys, path)


def test_scope_is_stated(capsys: Capture) -> None:
    settings = Settings.from_environment()
    world = Settings(settings.directory, run="run", rank=2, world_size=4)
    made = planted.Planted(planted.layers(2), settings=world)
    made.route_all([4])
    path = made.close()
    out = show(capsys, path)
    assert "rank 2 of 4 only; the other ranks have recordings of their own" in out
    assert "Whole run, exact counts (board)" in out
    assert "Per pass, mean over the passes still in the ring" in out
    found = show_json(capsys, path)
    assert set(found["scope"]) == {"whole_run", "per_pass", "ranks", "mean_of_layers", "null"}
    assert (found["recording"]["rank"], found["recording"]["world_size"]) == (2, 4)


def test_without_a_known_top_k_no_null_is_made_up(capsys: Capture) -> None:
    path = planted.recording([LayerSpec("a.gate", 8, 0), LayerSpec("b.gate", 8, 2)])
    found = show_json(capsys, path)
    unknown, known = found["layers"]
    assert unknown["top_k"] is None
    assert unknown["whole_run"]["gini"] is not None
    assert unknown["whole_run"]["gini_null"] == {"mean": None, "low": None, "high": None}
    assert unknown["per_pass"]["gini_corrected"] is None
    assert known["per_pass"]["gini_corrected"] is not None
    assert found["mean_of_layers"]["pass_gini_null"] is None, "a mean over one of two misleads"
    assert found["mean_of_layers"]["pass_gini"] is not None
    assert "'-' where top-k is unknown" in show(capsys, path)


def test_expert_parallel_ranks(capsys: Capture) -> None:
    made = planted.Planted([LayerSpec("gate", 4, 1)])
    made.route(0, [[0], [1], [1], [3]])
    path = made.close()
    ranks = show_json(capsys, path, "--ep", 2)["layers"][0]["ranks"]
    assert ranks["counts"] == [3, 1]
    assert ranks["busiest"] == 0
    assert ranks["balance"]["max_over_mean"] == pytest.approx(1.5)
    exact = nulls.null(4, 4, 1, metrics.contiguous_placement(4, 2))
    assert ranks["balance"]["max_over_mean_null"]["mean"] == pytest.approx(exact.max_over_mean_mean)
    out = show(capsys, path, "--ep", 2)
    assert "2 ranks, assuming equal contiguous runs of experts" in out
    assert "75.0 %" in out
    assert show_json(capsys, path)["layers"][0]["ranks"] is None


def test_ranks_that_do_not_divide_the_experts_are_not_measurable(capsys: Capture) -> None:
    path = planted.recording(planted.layers(1))
    ranks = show_json(capsys, path, "--ep", 3)["layers"][0]["ranks"]
    assert (ranks["balance"], ranks["counts"]) == (None, None)
    assert ranks["problem"] == "3 ranks do not divide 8 experts"
    assert "not measurable: 3 ranks do not divide 8 experts" in show(capsys, path, "--ep", 3)


def test_the_busiest_and_the_quietest_experts(capsys: Capture) -> None:
    made = planted.Planted([LayerSpec("gate", 4, 1)])
    made.route(0, [[2]] * 6 + [[0]] * 2)
    row = show(capsys, made.close(), "--experts").split("Experts, whole run")[1].splitlines()[3]
    assert row.split()[:5] == ["gate", "2", "(3.00)", "0", "(1.00)"]
    assert row.rstrip().endswith("2 (3.00)")


def test_what_is_not_observed_and_faults_are_shown(capsys: Capture) -> None:
    made = planted.Planted(planted.layers(1), uncovered=[Uncovered("mtp.gate", "fused kernel")])
    made.recorder.add_fault(Fault.BAD_SHAPE)
    made.recorder.add_fault(Fault.COPIED_SITE)
    path = made.close()
    found = show_json(capsys, path)
    assert found["uncovered"] == [{"name": "mtp.gate", "reason": "fused kernel"}]
    assert (found["faults"]["count"], found["faults"]["last"]) == (2, "COPIED_SITE")
    assert "copied after attach()" in found["faults"]["meaning"]
    out = show(capsys, path)
    assert "NOT OBSERVED: mtp.gate: fused kernel" in out
    assert "FAULTS: 2 (1 bad_shape, 1 copied_site), the last COPIED_SITE" in out


def test_every_fault_is_explained() -> None:
    from dodoco_ext.views.summary import FAULTS

    assert set(FAULTS) == set(Fault.__members__) - {"NONE"}


def test_ring_coverage(capsys: Capture) -> None:
    settings = Settings(Settings.from_environment().directory, max_bytes=1 << 16, record_every=2)
    made = planted.Planted(planted.layers(2), settings=settings)
    slots = made.recorder.num_slots
    made.route_all([3] * (2 * slots))
    found = show_json(capsys, made.close())
    ring = found["ring"]
    assert (ring["slots"], ring["records"], ring["lost"]) == (slots, slots, slots)
    assert ring["iterations"] == slots // 2
    assert ring["seconds"] > 0
    assert ring["record_every"] == 2
    assert found["layers"][0]["per_pass"]["passes"] == slots // 2
    out = show(capsys, "--latest")
    assert f"{slots:,} of {slots:,} records, {slots:,} older ones overwritten" in out
    assert "one iteration in 2" in out


def test_a_pass_in_flight_is_flagged(capsys: Capture) -> None:
    path = planted.recording(planted.layers(2))
    planted.tear(path)
    assert [layer["in_flight"] for layer in show_json(capsys, path)["layers"]] == [True, False]
    out = show(capsys, path)
    assert re.search(r"^0\*", out, re.MULTILINE)
    assert "* in flight" in out


def test_impossible_records_are_left_out(capsys: Capture) -> None:
    path = planted.recording(planted.layers(2))
    planted.spoil(path)
    found = show_json(capsys, path)
    assert found["ring"]["implausible"] == 1
    assert [layer["per_pass"]["passes"] for layer in found["layers"]] == [2, 3]
    assert "damaged: 1 impossible record" in show(capsys, path)


def test_a_dead_recording_says_so(recordings: Path, capsys: Capture) -> None:
    path = planted.dead_recording(recordings)
    assert "dead: its process went without closing it" in show(capsys, path)
    assert show_json(capsys, path)["layers"][1]["tokens"] == 8


def test_a_recording_without_a_pass(capsys: Capture) -> None:
    path = planted.Planted(planted.layers(2)).close()
    (first, _) = show_json(capsys, path, "--ep", 2)["layers"]
    assert first["whole_run"]["gini"] is None
    assert first["per_pass"]["passes"] == 0
    assert first["ranks"]["busiest"] is None
    out = show(capsys, path, "--ep", 2, "--experts")
    assert "no records in the ring yet" in out
    assert "nan" not in out


def test_text_of_a_recording_cannot_control_the_terminal(capsys: Capture) -> None:
    labels = {"model_name": "bad\x1b]0;title\x07[red]name[/red]", "note": "a\nb"}
    path = planted.recording(planted.layers(1), labels=labels)
    for out in (show(capsys), show(capsys, path)):
        assert "\x1b" not in out
        assert "\x07" not in out
        assert "[red]name[/red]" in out
    assert "note=a?b" in show(capsys, path)


def test_layer_names_are_shortened_to_what_differs(capsys: Capture) -> None:
    out = show(capsys, planted.recording(planted.layers(12)))
    assert "layers: model.layers.*.mlp.gate" in out
    assert re.search(r"^11 ", out, re.MULTILINE)
    names = ("encoder.gate", "decoder.block.0.router")
    out = show(capsys, planted.recording([LayerSpec(name, 8, 2) for name in names]))
    assert "layers:" not in out
    assert re.search(r"^decoder\.block\.0\.router ", out, re.MULTILINE)


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    labels = {"model_name": "an-organisation/a-model-with-a-long-name-A3B"}
    path = planted.recording(planted.layers(3, 128, 8), [300, 500, 7], labels=labels)
    listing = show(capsys)
    assert path.name in listing
    out = show(capsys, path.name, "--ep", 8, "--experts")
    assert "…" not in out
    lines = [line for line in out.splitlines() if not line.startswith("recording ")]
    assert max(len(line) for line in [*lines, *listing.splitlines()[1:]]) <= width
    whole = out.split("Whole run")[1].splitlines()
    assert whole[3].split()[:4] == ["0", "3", "807", "6,456"]
