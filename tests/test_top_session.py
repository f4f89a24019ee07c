"""What the live view says: of growing, ended, restarted, broken and foreign recordings; no terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import planted
import runs
from dodoco_ext import metrics
from dodoco_ext.capture import Capture
from dodoco_ext.cost_of_imbalance import cost_of
from dodoco_ext.null_grid import floors
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings
from dodoco_ext.transfers import DISPATCH
from dodoco_ext.views.top.columns import BLOCKS, COLUMNS, Layout, ordered, sparkline
from dodoco_ext.views.top.figures import short_names
from dodoco_ext.views.top.frame import Choice, Frame
from dodoco_ext.views.top.session import Session
from dodoco_ext.views.top.text import detail_lines, frame_lines

pytestmark = pytest.mark.timeout(60)

SPECS = planted.layers(3, 16, 2)


class Clock:
    """Looks of a session a second apart, whatever the time."""

    def __init__(self, source: str | None = None, **options: object) -> None:
        self.session = Session(source, **options)  # type: ignore[arg-type]
        self.now_s = 1000.0

    def look(self, seconds: float = 1.0) -> Frame:
        self.now_s += seconds
        return self.session.look(self.now_s)


def one_rank(**options: object) -> planted.Planted:
    return planted.Planted(SPECS, **options)  # type: ignore[arg-type]


# ---- figures -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_window() -> None:
    recording = one_rank()
    recording.route_all([50], skew=3.0)
    clock = Clock()
    clock.look()
    recording.route_all([32, 8], skew=0.5, seed=1)
    frame = clock.look(seconds=2.0)
    assert frame.span == "last 2.0 s"
    for row, layer in zip(frame.rows, Reader(recording.path).snapshot().layers, strict=True):
        assert (row.passes, row.tokens, row.tokens_per_s) == (2, 40, 20.0)
        assert int(row.counts.sum()) == 80
        assert row.gini == pytest.approx(float(metrics.gini(row.counts)))
        assert row.gini_floor == pytest.approx(float(floors([80], 16, 2).gini[0]))
        assert row.peak == pytest.approx(16 * row.counts.max() / 80)
        assert row.hottest[0] == (int(row.counts.argmax()), row.counts.max() / 80) or (
            row.counts[row.hottest[0][0]] == row.counts.max()
        )
        assert (layer.counts >= row.counts).all()


def test_the_window_moves_on() -> None:
    recording, clock = one_rank(), Clock(window_s=10.0)
    clock.look()
    recording.route_all([100])
    assert clock.look().rows[0].tokens == 100
    for _ in range(9):
        recording.route_all([1])
        frame = clock.look()
    assert frame.rows[0].tokens == 109
    recording.route_all([1])
    assert clock.look().rows[0].tokens == 10, "the hundred are more than ten seconds ago"
    assert len(frame.rows[0].tokens_line) == 10


def test_many_looks_keep_no_more_than_the_window_has_parts() -> None:
    recording, clock = one_rank(), Clock(window_s=60.0)
    clock.look()
    for _ in range(300):
        recording.route_all([1])
        frame = clock.look(seconds=0.25)
    assert len(frame.rows[0].gini_line) <= 61
    assert frame.rows[0].tokens == pytest.approx(240, abs=8)


def test_the_whole_run_is_shown_where_nothing_is_new_or_when_asked() -> None:
    recording, clock = one_rank(), Clock()
    recording.route_all([50])
    frame = clock.look()
    assert (frame.span, frame.rows[0].tokens) == ("whole run", 50)
    recording.route_all([10])
    assert clock.look().rows[0].tokens == 10
    clock.session.whole_run = True
    assert (clock.look().span, clock.look().rows[0].tokens) == ("whole run", 60)


def test_all_ranks_of_a_run_are_summed() -> None:
    ranks = [runs.rank_of(rank, 4, SPECS) for rank in range(4)]
    clock = Clock("job")
    clock.look()
    for number, rank in enumerate(ranks):
        rank.route_all([10 * (number + 1)], seed=number)
    frame = clock.look()
    assert frame.rows[0].tokens == 100
    assert frame.rank_tokens == {0: 10, 1: 20, 2: 30, 3: 40}
    assert "4 ranks: 4 live" in frame.status


# ---- the cost line -------------------------------------------------------------------------------


def test_the_cost_is_that_of_ranks_with_contiguous_experts_and_a_lower_bound() -> None:
    ranks = [runs.rank_of(rank, 2, planted.layers(1, 4, 1)) for rank in range(2)]
    clock = Clock("job")
    clock.look()
    ranks[0].route(0, [[0], [0], [0], [1]])
    ranks[1].route(0, [[2], [0], [1], [0]])
    frame = clock.look()
    loads = [[7, 1]]
    assert frame.cost.cost == cost_of(loads, 4, 1)
    assert frame.cost.text.startswith("Ranks wait >= 42.9 % of expert time (chance ")
    assert frame.cost.text.endswith("balanced: >= 1.75x as fast")
    assert "contiguous experts assumed" in frame.cost.scope
    assert frame.rows[0].loads.tolist() == loads


def test_looks_are_steps_of_their_own() -> None:
    """Load that takes turns from look to look does not cancel."""
    ranks = [runs.rank_of(rank, 2, planted.layers(1, 4, 1)) for rank in range(2)]
    clock = Clock("job")
    clock.look()
    for expert in (0, 3, 0, 3):
        ranks[0].route(0, [[expert]] * 10)
        frame = clock.look()
    assert frame.cost.cost.waiting == pytest.approx(0.5)
    assert frame.rows[0].loads.tolist() == [[20, 20]]


def test_one_rank_is_taken_expert_by_expert_and_pass_by_pass() -> None:
    recording, clock = planted.Planted(planted.layers(1, 4, 1)), Clock()
    clock.look()
    recording.route(0, [[0]] * 10)
    recording.route(0, [[1]] * 10)
    frame = clock.look()
    assert frame.cost.basis == "expert"
    assert frame.cost.text.startswith("One rank, by expert: 75.0 % waiting")
    assert (frame.cost.cost.steps, frame.cost.cost.speedup) == (2, 4.0)


def test_ep_says_how_many_ranks_share_the_experts() -> None:
    recording, clock = planted.Planted(planted.layers(1, 4, 1)), Clock(num_ranks=2)
    clock.look()
    recording.route(0, [[0], [1], [1], [2]])
    assert clock.look().cost.cost == cost_of([[3, 1]], 4, 1)


def test_ranks_that_do_not_divide_the_experts_are_not_assumed() -> None:
    recording, clock = planted.Planted(planted.layers(1, 4, 1)), Clock(num_ranks=3)
    clock.look()
    recording.route(0, [[0], [1], [1], [2]])
    assert clock.look().cost.basis == "expert"


def dispatch_ranks(number: int) -> list[Recorder]:
    settings = Settings.from_environment()
    found = []
    for index in range(number):
        mine = Settings(settings.directory, 1 << 20, run="ep", rank=index, world_size=number)
        group = GroupSpec(tuple(range(number)), index)
        layers = [LayerSpec("moe", 8, 2, routed=False)]
        found.append(Recorder(layers, group=group, settings=mine))
    return found


def exchange(captures: Sequence[Capture], matrix: Sequence[Sequence[int]], begin_ns: int) -> None:
    """One dispatch: matrix[i][j] rows from i to j."""
    for index, capture in enumerate(captures):
        received = [row[index] for row in matrix]
        capture.push(0, DISPATCH, list(matrix[index]), received, begin_ns, begin_ns + 500)


def test_recorded_dispatches_are_taken_as_they_are_one_by_one() -> None:
    captures = [Capture(recorder, advances=True) for recorder in dispatch_ranks(2)]
    clock = Clock("ep")
    clock.look()
    exchange(captures, [[4, 0], [4, 0]], 1000)
    exchange(captures, [[0, 4], [0, 4]], 2000)
    frame = clock.look()
    assert frame.cost.basis == "dispatch"
    assert frame.cost.cost == cost_of([[8, 0], [0, 8]], 8, 2)
    assert frame.cost.text.startswith("Ranks wait 50.0 % of expert time")
    assert frame.rows[0].loads.tolist() == [[8, 8]]
    assert frame.rows[0].measured


def test_a_dispatch_counts_once_and_when_its_last_rank_has_recorded_it() -> None:
    captures = [Capture(recorder, advances=True) for recorder in dispatch_ranks(2)]
    clock = Clock("ep")
    clock.look()
    captures[0].push(0, DISPATCH, [3, 1], [3, 1], 1000, 1500)
    assert clock.look().cost.cost.steps == 0
    captures[1].push(0, DISPATCH, [1, 1], [1, 1], 1000, 1500)
    assert clock.look().cost.cost == cost_of([[4, 2]], 8, 2)
    assert clock.look().cost.cost.steps == 1


# ---- states --------------------------------------------------------------------------------------


def test_what_is_not_there_yet_is_waited_for_and_it_says_where(recordings: Path) -> None:
    clock = Clock()
    frame = clock.look()
    assert frame.waiting == f"No recording yet; looking in {recordings}."
    one_rank().route_all([4])
    assert not clock.look().waiting


@pytest.mark.parametrize("source", ["no-such-run", "4711", "/no/such/folder/x.dodoco"])
def test_a_source_that_does_not_exist_is_waited_for(source: str) -> None:
    one_rank()
    assert source in Clock(source).look().waiting


def test_a_closed_recording_keeps_its_last_state() -> None:
    recording, clock = one_rank(), Clock()
    clock.look()
    recording.route_all([12])
    clock.look()
    recording.close()
    for _ in range(200):
        frame = clock.look()
    assert "closed" in frame.status
    assert frame.notes == ("Ended, closed: the last state is kept; a restart will be followed.",)
    assert (frame.span, frame.rows[0].tokens) == ("last 1.0 s", 12)


def test_a_killed_rank_is_named_and_its_counts_stay(recordings: Path) -> None:
    path = planted.dead_recording(recordings)
    frame = Clock(str(path)).look()
    assert "killed" in frame.status
    assert frame.rows[0].tokens == 8


def test_a_missing_rank_is_named() -> None:
    for rank in (0, 1, 3):
        runs.rank_of(rank, 4, SPECS).route_all([4])
    assert "Missing: rank 2 of 4; not counted in." in Clock("job").look().notes


def test_a_restarted_rank_is_followed_and_nothing_is_counted_twice() -> None:
    first, other = (runs.rank_of(rank, 2, SPECS) for rank in range(2))
    clock = Clock("job")
    clock.look()
    first.route_all([10])
    other.route_all([10])
    assert clock.look().rows[0].tokens == 20
    first.close()
    again = runs.rank_of(0, 2, SPECS)
    again.route_all([5])
    frame = clock.look()
    assert frame.rows[0].tokens == 25
    assert "2 ranks: 2 live" in frame.status
    again.route_all([5])
    assert clock.look().rows[0].tokens == 30


def test_a_restart_without_a_name_of_the_run_is_followed(recordings: Path) -> None:
    def unnamed(run: str) -> planted.Planted:
        settings = Settings(recordings, runs.SMALL_BYTES, run=run)
        return planted.Planted(SPECS, settings=settings)

    first = unnamed("20260101-000000")
    clock = Clock(str(first.path))
    clock.look()
    first.close()
    clock.look()
    unnamed("20260101-000005").route_all([7])
    frame = clock.look()
    assert frame.status.startswith("20260101-000005")
    assert frame.rows[0].tokens == 7


def test_without_a_source_a_new_run_is_shown_when_the_old_one_has_ended() -> None:
    old = runs.rank_of(0, 1, SPECS, run="old")
    clock = Clock()
    clock.look()
    new = runs.rank_of(0, 1, SPECS, run="new")
    assert clock.look().status.startswith("old")
    old.close()
    assert clock.look().status.startswith("new")
    new.close()


def test_a_named_source_is_not_left_for_another_run() -> None:
    old = runs.rank_of(0, 1, SPECS, run="old")
    clock = Clock("old")
    clock.look()
    runs.rank_of(0, 1, SPECS, run="new").route_all([1])
    old.close()
    assert clock.look().status.startswith("old")


@pytest.mark.parametrize("left", [0, 100, 5000])
def test_a_recording_truncated_meanwhile_is_told_and_its_last_state_stays(left: int) -> None:
    path, clock = planted.recording(SPECS, [9]), Clock()  # closed: a writer of ours would be hit
    clock.look()
    os.truncate(path, left)
    for _ in range(3):
        frame = clock.look()
    assert "truncated" in frame.status
    assert frame.rows[0].tokens == 9


def test_a_removed_file_is_read_on() -> None:
    recording, clock = one_rank(), Clock()
    clock.look()
    recording.path.unlink()
    recording.route_all([6])
    assert clock.look().rows[0].tokens == 6


def test_files_that_are_none_are_named_and_in_nobodys_way(recordings: Path) -> None:
    one_rank().route_all([4])
    (recordings / "foreign.dodoco").write_bytes(b"something else" * 1000)
    frame = Clock().look()
    assert frame.rows[0].tokens == 4
    assert any("foreign.dodoco" in note for note in frame.notes)


def test_ranks_that_are_not_of_one_model_are_told_and_one_is_shown() -> None:
    runs.rank_of(0, 2, planted.layers(1, 8, 2)).route_all([4])
    runs.rank_of(1, 2, planted.layers(1, 16, 2)).route_all([4])
    frame = Clock("job").look()
    assert any("give recordings of one model" in note for note in frame.notes)
    assert len(frame.rows) == 1


def test_names_from_a_file_cannot_write_to_the_terminal() -> None:
    recording = planted.Planted([LayerSpec("evil\x1b[2J", 8, 2)])
    recording.route_all([4])
    lines = frame_lines(Clock().look(), 80)
    assert not any("\x1b" in line for line in lines)


# ---- what is looked at ---------------------------------------------------------------------------


def test_a_rank_of_a_run_can_be_chosen() -> None:
    ranks = [runs.rank_of(rank, 2, SPECS) for rank in range(2)]
    for number, rank in enumerate(ranks):
        rank.route_all([10 * (number + 1)])
    clock = Clock()
    choices = clock.look().choices
    assert [choice.text.split(",")[0] for choice in choices] == [
        "job: all ranks",
        "job: rank 1",
        "job: rank 0",
    ]
    clock.session.choose(choices[1])
    frame = clock.look()
    assert frame.rows[0].tokens == 20
    assert "rank 1" in frame.status


@pytest.mark.parametrize("kind", ["file", "name", "pid", "folder", "run"])
def test_every_source_means_what_it_means_elsewhere(kind: str, recordings: Path) -> None:
    mine = runs.rank_of(0, 1, SPECS)
    mine.route_all([11])
    sources = {
        "file": str(mine.path),
        "name": mine.path.name,
        "pid": str(os.getpid()),
        "folder": str(recordings),
        "run": "job",
    }
    assert Clock(sources[kind]).look().rows[0].tokens == 11


def test_choices_that_are_called_otherwise_now_are_the_same() -> None:
    assert Choice("a", "x", "live").means(Choice("a", "x", "closed"))
    assert not Choice("a", "x", "").means(Choice("a", None, ""))


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_every_line_fits_the_terminal(width: int) -> None:
    recording, clock = planted.Planted(planted.layers(12, 256, 8)), Clock()
    clock.look()
    recording.route_all([64], skew=2.0)
    frame = clock.look()
    layout = Layout.of(width, frame.rows)
    assert sum(layout.widths) <= width
    for line in (*frame_lines(frame, width), *detail_lines(frame, frame.rows[3], width)):
        assert len(line) <= width, line


def test_cost_lines_fit_80_columns_whatever_they_say() -> None:
    for num_experts, top_k in ((4, 1), (256, 1), (256, 0)):
        for num_ranks in (None, 2, 128):
            recording = planted.Planted(planted.layers(1, num_experts, top_k))
            clock = Clock(num_ranks=num_ranks)
            clock.look()
            recording.route(0, [[0]] * 1000)
            frame = clock.look()
            assert frame.cost.cost.steps == 1
            assert len(frame.cost.text) <= 80, frame.cost.text
            recording.close()


def test_short_names_leave_what_tells_layers_apart() -> None:
    assert short_names(["m.layers.1.mlp.gate", "m.layers.12.mlp.gate"]) == ["1", "12"]
    assert short_names(["encoder.0.gate", "decoder.0.gate"]) == ["encoder", "decoder"]
    assert short_names(["gate"]) == ["gate"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]


def test_lines_have_gaps_where_nothing_was_counted() -> None:
    values = np.array([0.0, np.nan, 0.5, 1.0])
    assert sparkline(values, 4, 1.0) == BLOCKS[0] + " " + BLOCKS[4] + BLOCKS[7]
    assert len(sparkline(np.linspace(0, 1, 60), 9, 1.0)) == 9
    assert sparkline(np.array([]), 9, 1.0) == ""


@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_rows_are_ordered_by_any_column_and_what_is_unknown_comes_last(column: int) -> None:
    recording = planted.Planted([LayerSpec(f"l.{i}", 8, 2) for i in range(4)])
    clock = Clock()
    clock.look()
    for layer, tokens in ((0, 5), (2, 50), (3, 20)):  # nothing at layer 1
        rng = np.random.default_rng(layer)
        ids = planted.random_ids(rng, tokens, recording.specs[0], skew=layer)
        recording.route(layer, ids)
    rows = clock.look().rows
    for reverse in (False, True):
        keys = [COLUMNS[column].key(row) for row in ordered(rows, column, reverse=reverse)]
        known = [key for key in keys if key == key]
        assert known == sorted(known, reverse=COLUMNS[column].falling != reverse)
        assert all(key != key for key in keys[len(known) :])


def test_the_detail_has_all_experts_ranks_and_last_passes() -> None:
    ranks = [runs.rank_of(rank, 2, SPECS) for rank in range(2)]
    clock = Clock("job")
    clock.look()
    for rank in ranks:
        rank.route_all([7, 33], skew=1.0)
    frame = clock.look()
    text = "\n".join(detail_lines(frame, frame.rows[1], 80))
    assert text.startswith("model.layers.1.mlp.gate: top 2 of 16 experts, last 1.0 s")
    assert "Received by rank (contiguous placement assumed)" in text
    assert "Tokens routed by rank" in text
    experts = text.split("Experts, hottest first")[1].splitlines()[1:]
    assert sorted(int(line.split()[0]) for line in experts) == list(range(16))
    counts = [int(line.split()[2]) for line in experts]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == 160
    assert [p.tokens for p in frame.last_passes(frame.rows[1], 4)] == [33, 7, 33, 7]


def test_looking_needs_neither_torch_nor_a_terminal_library() -> None:
    script = (
        "from dodoco_ext.cli import run\nassert run(['top', '--once', '--interval', '0.1']) == 0\n"
        "import sys\nassert not {'torch', 'triton', 'textual'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
