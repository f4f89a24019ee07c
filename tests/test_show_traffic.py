"""`dodoco show` of runs with transfers: `--fleet`, and `--last`: how a run ended."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dodoco_ext import cli
from dodoco_ext.recorder import LayerSpec
from dodoco_ext.views.ending import seconds_of
from dodoco_ext.views.traffic import _band_text, _short
from exchanges import exchanges
from runs import closed_rank, rank_of
from shown import Capture, show, show_json
from traffic_runs import MILLISECOND, Rank, record, recorded

RNG = np.random.default_rng(67)
SECOND = 1000 * MILLISECOND


def error(capsys: Capture, *arguments: object, code: int = cli.EXIT_ERROR) -> str:
    assert cli.run(["show", *map(str, arguments)]) == code
    return capsys.readouterr().err


def some(number: int, num_ranks: int, layers: int = 2) -> Any:
    return exchanges(list(RNG.integers(1, 30, (number, num_ranks, num_ranks))), layers)


# --- --fleet -------------------------------------------------------------------------------------


def test_the_traffic_of_a_run_is_shown_whole(capsys: Capture) -> None:
    run = some(8, 4)
    record(run, {r: Rank(r, range(4)) for r in range(4)}, lasted_ns=[1000, 2000, 3000, 4000])
    found = show_json(capsys, "job", "--fleet")
    (group,) = found["traffic"]
    assert (group["name"], group["ranks"], group["absent"]) == ("ep", [0, 1, 2, 3], [])
    truth = sum(each.matrix for each in run if each.type == 2)
    assert group["total"]["dispatch"]["sent"] == truth.tolist()
    assert group["total"]["dispatch"]["received"] == truth.tolist()
    assert group["total"]["combine"]["executions"] == [4] * 4
    assert group["rings"] == {
        "transfers": 8,
        "sound": 8,
        **dict.fromkeys(("incomplete", "disagree", "apart", "out_of_step", "left_out"), 0),
    }
    assert group["waiting"]["all"]["waited_ns"] == [0, 8000, 16000, 24000]
    for layer, index in zip(group["layers"], range(2), strict=True):
        mine = sum(e.matrix for e in run if (e.layer, e.type) == (index, 2)).sum(axis=0)
        assert layer["received"] == mine.tolist()
        assert layer["hottest"] == int(mine.argmax())
        assert layer["unit"] == "assignment"
        assert layer["per_dispatch"]["dispatches"] == 2
        assert 0 < layer["per_dispatch"]["gini_null"] < 1
        assert layer["gini_null"]["low"] < layer["gini_null"]["high"]
    assert set(found["traffic_scope"]) == {"matrix", "per_dispatch", "null", "waiting"}
    out = show(capsys, "job")
    assert "Traffic of group ep: ranks 0 to 3" in out
    assert "rings: 8 of 8 transfers are whole" in out
    for row in truth:
        assert all(str(int(n)) in out for n in row)
    assert "nan" not in out


def test_layers_without_an_observed_router_are_no_zeros(capsys: Capture) -> None:
    recorded(some(4, 2), 2)
    out = show(capsys, "job")
    assert "2 layers: routers not observed, transfers only" in out
    assert "Whole run, all ranks read" not in out
    assert [layer["routed"] for layer in show_json(capsys, "job")["layers"]] == [False, False]
    (path, _) = [Path(r["path"]) for r in show_json(capsys, "job")["ranks"]]
    one = show(capsys, path)
    assert "2 layers: routers not observed, transfers only" in one
    assert "transfers in group ep of 2 ranks: `dodoco show job --fleet`" in one
    assert "Whole run" not in one


def test_a_large_group_is_abbreviated(capsys: Capture) -> None:
    recorded(some(2, 20, 1), 20, layers=1)
    assert "the 16 of 20 that received most" in show(capsys, "job")
    assert len(show_json(capsys, "job")["traffic"][0]["total"]["dispatch"]["sent"]) == 20


def test_gaps_and_contradictions_are_named(recordings: Path, capsys: Capture) -> None:
    recorded(some(4, 2), 2, run_name="other")
    run = some(8, 3)
    ranks = {r: Rank(r, range(3)) for r in range(3)}
    record(run[:4], ranks)
    wrong = run[4].matrix.copy()
    wrong[0, 1] += 1
    record([replace(run[4], number=0, matrix=wrong)], {0: ranks[0]})
    record([replace(run[4], number=0)], {1: ranks[1], 2: ranks[2]})
    for rank in ranks.values():
        os.utime(rank.close())
    out = show(capsys, recordings)
    assert "not of this run, in the same folder: other (2)" in out
    assert "DISAGREE: sender and receiver say different things in 1 transfers (rank 0 to 1)" in out
    ranks[2].path.unlink()
    out = show(capsys, "job")
    assert "NOT IN IT: rank 2 (missing)" in out
    assert "not one matrix" in out
    assert "?" in out


def test_a_run_without_transfers_shows_none(capsys: Capture) -> None:
    closed_rank(0, 1)
    assert "Traffic" not in show(capsys, "job", "--fleet")
    assert show_json(capsys, "job", "--fleet")["traffic"] == []


# --- --last --------------------------------------------------------------------------------------


def ended_run() -> dict[int, Rank]:
    """Forty seconds of two layers at four ranks; rank 2 did not finish the combine of iteration 9, layer
    1, and is behind since; expert 5 is hot."""
    run = some(40, 4)
    ranks = {r: Rank(r, range(4)) for r in range(4)}
    counts = {r: [10, 90 if r == 2 else 10] for r in range(4)}
    record(
        run,
        ranks,
        spacing_ns=SECOND,
        lasted_ns=[4 * MILLISECOND, 2 * MILLISECOND, MILLISECOND, 3 * MILLISECOND],
        until={2: 39},
        experts=counts,
    )
    return ranks


def test_one_command_names_iteration_layer_expert_and_the_seconds_before(capsys: Capture) -> None:
    ranks = ended_run()
    for rank in (0, 1, 3):
        ranks[rank].close()
    found = show_json(capsys, "job", "--last", "30s")
    assert found["schema"] == "dodoco.ending/1"
    (stood,) = found["stood"]
    assert (stood["lacking"], stood["finished"], stood["unknown"]) == ([2], [0, 1, 3], [])
    at = stood["at"]
    assert (at["iteration"], at["layer"], at["op"]) == (9, "layers.1.mlp", "combine")
    after = stood["after"]
    assert (after["iteration"], after["layer"], after["op"]) == (9, "layers.1.mlp", "dispatch")
    hot = found["hottest_experts"][0]
    assert (hot["expert"], hot["rank"], hot["scope"]) == ("5", 2, "window")
    assert hot["over_mean"] == pytest.approx(90 * 8 / 160)
    assert [(r["rank"], r["behind"], r["state"]) for r in found["ranks"]] == [
        (0, 0, "closed"),
        (1, 0, "closed"),
        (2, 1, "live"),
        (3, 0, "closed"),
    ]
    assert found["ranks"][2]["before_end_s"] == pytest.approx(1.0, abs=0.01)
    assert len(found["steps"]) == 30
    assert [step["from_s"] for step in found["steps"]] == [float(s) for s in range(30, 0, -1)]
    assert [step["transfers"] for step in found["steps"]] == [4] * 29 + [3]
    assert found["steps"][-1]["last"] == 9
    assert found["waited_s"]["0"] == pytest.approx(29 * 0.003)
    assert found["waited_s"]["2"] == 0
    out = show(capsys, "job", "--last", "30s")
    assert (
        "STOOD AT iteration 9, layer layers.1.mlp, combine: rank 2 had not finished it, rank 0 to 1, 3 "
        "had" in out
    )
    assert "hottest expert 5 of layers.0.mlp on rank 2: " in out or (
        "hottest expert 5 of layers.1.mlp on rank 2: " in out
    )
    assert "rank 2 least (0.00 s): the others waited for it" in out
    assert "nan" not in out


def test_rows_received_are_those_of_the_window(capsys: Capture) -> None:
    run = some(40, 2)
    record(run, {r: Rank(r, range(2)) for r in range(2)}, spacing_ns=SECOND)
    found = show_json(capsys, "job", "--last", "10s")
    truth = sum(e.matrix.sum(axis=0) for e in run if e.number >= 30 and e.type == 2)
    assert [found["received"][str(r)] for r in range(2)] == truth.tolist()
    assert sum(step["rows"] for step in found["steps"]) == truth.sum()


def test_where_all_finished_the_same_that_is_said(capsys: Capture) -> None:
    recorded(some(8, 2), 2)
    (stood,) = show_json(capsys, "job", "--last", "5m")["stood"]
    assert stood["at"] is None
    assert (stood["after"]["iteration"], stood["after"]["op"]) == (1, "combine")
    assert stood["finished"] == [0, 1]
    out = show(capsys, "job", "--last", "5m")
    assert (
        "STOOD AFTER iteration 1, layer layers.1.mlp, combine: rank 0 to 1 had finished it" in out
    )


def test_without_counts_per_expert_the_hottest_is_that_of_the_run(capsys: Capture) -> None:
    made = rank_of(0, 2)
    made.route_all([8, 8], skew=9.0)
    made.close()
    found = show_json(capsys, "job", "--last", "30s")
    assert found["stood"] == []
    assert found["ranks"][1]["state"] == "missing"
    hot = found["hottest_experts"][0]
    assert (hot["expert"], hot["rank"], hot["scope"]) == ("7", None, "run")
    last = found["ranks"][0]["last"]
    assert (last["op"], last["iteration"]) == ("route", 1)
    assert found["steps"][-1]["tokens"] == 32
    out = show(capsys, "job", "--last", "30s")
    assert "over the whole run (the rings hold no counts per expert)" in out
    assert "MISSING: no recording of rank 1" in out


def test_a_late_joiner_is_compared_with_nobody(capsys: Capture) -> None:
    run = some(24, 3)
    ranks = {r: Rank(r, range(3)) for r in range(3)}
    now = time.monotonic_ns()
    for each in run:
        for number, rank in ranks.items():
            if number < 2 or each.iteration >= 4:
                rank.push(each, now + each.number * SECOND, 1000)
    found = show_json(capsys, "job", "--last", "30s")
    (stood,) = found["stood"]
    assert stood["unknown"] == [2]
    assert stood["finished"] == [0, 1]
    assert found["ranks"][2]["behind"] is None


def test_recordings_of_both_kinds_give_the_later_of_pass_and_transfer(capsys: Capture) -> None:
    specs = [LayerSpec("gate", 8, 2)]
    run = some(2, 1, 1)
    rank = Rank(0, (0,), specs=specs)
    record(run, {0: rank})
    last = show_json(capsys, "job", "--last", "1")["ranks"][0]["last"]
    assert (last["op"], last["layer"]) == ("combine", "gate")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("30", 30), ("1.5 m", 90), ("2min", 120), ("1h", 3600)]
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-3s", "30 days", "nan", "1e9999h"])
def test_what_is_no_time_is_one_line(text: str, capsys: Capture) -> None:
    recorded(some(2, 1), 1)
    assert "give a time above 0, such as 30s" in error(capsys, "job", "--last", text)


def test_a_run_without_records_is_one_line(capsys: Capture) -> None:
    rank_of(0, 1).close()
    assert "has no record in its rings" in error(capsys, "job", "--last", "30s")


def test_it_goes_with_no_option_for_one_recording(capsys: Capture) -> None:
    message = error(capsys, "job", "--last", "30s", "--save", "x", code=cli.EXIT_USAGE)
    assert "give --last or --save, not both" in message


def test_a_share_of_nothing_is_no_number() -> None:
    assert _band_text({"low": nan, "high": nan}, 2) == "-"
    assert [_short(n) for n in (0, 9999, 10_000, 12_345_678, 10**18)] == [
        *("0", "9999", "10k", "12.3M", "1E")
    ]
