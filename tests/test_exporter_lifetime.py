"""Recordings come and go; labels stay, and what is summed over ranks never goes back."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

import dodoco_ext as dodoco
from children import process, say
from dodoco_ext.views.exporter.state import State
from dodoco_ext.views.exporter.table import OPTIONS
from exposed import Clock, scraped
from served import Served, server, work

# A server of one rank, which routes for every line that it is sent.
START = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from served import Served, work
made = Served(layers=1)
made.route_all(8)
print(made.path, flush=True)
"""
GO_ON = """
for line in sys.stdin:
    made.route_all(int(line), skew=1.0)
    print("routed", flush=True)
"""
RANK = {"model_name": "tiny", "ep_group": "none", "rank": 0}


def test_nothing_yet_then_up_then_killed_then_restarted() -> None:
    state = State()
    assert scraped(state).by("state", "exporter_recordings")["live"] == 0
    with process(GO_ON, START) as (child, first):
        say(child, "5")
        assert child.stdout is not None
        assert child.stdout.readline() == "routed\n"
        seen = scraped(state)
        assert seen.one("recorder_up", **RANK) == 1
        assert seen.one("tokens_total", **RANK) == 13
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    seen = scraped(state)
    assert seen.one("recorder_up", **RANK) == 0
    assert seen.one("tokens_total", **RANK) == 13, "what it counted is kept"
    with process(GO_ON, START) as (_, second):
        assert second != first
        seen = scraped(state)
        assert seen.one("recorder_up", **RANK) == 1
        assert seen.one("tokens_total", **RANK) == 8, "a restart, as Prometheus knows it"
        assert seen.by("state", "exporter_recordings")["shadowed"] == 1


def test_sums_over_ranks_do_not_go_back_at_a_restart() -> None:
    state = State()
    ranks = server(2, layers=1)
    passes = []
    for seed in range(4):
        work(ranks, seed=seed)
        if seed == 2:  # rank 1 is started anew; its old recording was pruned meanwhile
            before = ranks[1]
            before.close()
            ranks[1] = Served(1, (0, 1), layers=1)
            assert state.update().shown[1].up
            before.path.unlink()
        elif seed == 1:
            state.update()
            work(ranks[1:], seed=9)  # and this nobody has seen before it ended
        passes.append(sum(scraped(state).of("pass_max_over_mean_count").values()))
    assert passes == [2, 5, 7, 9]


def test_a_recording_that_ended_stays_for_a_time() -> None:
    clock = Clock()
    state = State(keep_s=100, clock=clock)
    made = Served()
    made.route_all(4)
    other = Served(1)
    scraped(state)
    made.close()
    clock.now_ns = int(dodoco.Reader(made.path).header["closed_unix_ns"])
    for seconds, there in ((0, True), (99, True), (2, False)):
        clock.pass_by(seconds)
        seen = scraped(state)
        up = seen.by("rank", "recorder_up")
        assert up == ({"0": 0, "1": 1} if there else {"1": 1})
        assert bool(seen.of("tokens_total", rank=0)) == there
    assert seen.by("state", "exporter_recordings") == {
        "live": 1,
        "closed": 1,
        "dead": 0,
        "unreadable": 0,
        "shadowed": 0,
    }
    other.close()


def test_one_that_ended_long_before_the_exporter_started_is_not_exposed() -> None:
    made = Served()
    made.route_all(4)
    made.close()
    clock = Clock()
    clock.pass_by(3600)
    assert scraped(State(keep_s=900, clock=clock)).of("recorder_up") == {}


def test_of_two_with_equal_labels_the_later_live_one_is_exposed() -> None:
    first, second = Served(run="a"), Served(run="b")
    first.route_all(3)
    second.route_all(5)
    seen = scraped(State())
    assert set(seen.by("layer", "tokens_total").values()) == {5}
    assert seen.by("state", "exporter_recordings")["shadowed"] == 1
    second.close()
    seen = scraped(State())
    assert set(seen.by("layer", "tokens_total").values()) == {3}, "one that lives comes first"


def test_files_that_are_no_recordings_are_counted_and_harm_nothing(recordings: Path) -> None:
    made = Served()
    made.route_all(4)
    whole = made.path.read_bytes()
    (recordings / "odd.r00000.1.dodoco").write_bytes(b"nothing of the kind")
    (recordings / "cut.r00001.2.dodoco").write_bytes(whole[: len(whole) // 2])
    seen = scraped(State())
    assert seen.by("state", "exporter_recordings")["unreadable"] == 2
    assert seen.one("tokens_total", layer=made.specs[0].name) == 4


def test_a_recording_cut_while_it_is_exposed_is_unreadable_from_then_on() -> None:
    state = State()
    made, other = Served(), Served(1)
    for each in (made, other):
        each.route_all(4)
    assert set(scraped(state).by("rank", "recorder_up")) == {"0", "1"}
    os.truncate(made.path, 5000)
    seen = scraped(state)
    assert set(seen.by("rank", "recorder_up")) == {"1"}
    assert seen.by("state", "exporter_recordings")["unreadable"] == 1


def test_damaged_recordings_are_exposed_or_counted_and_never_an_error() -> None:
    ranks = server(2, max_bytes=1 << 17)
    for seed in range(3):
        work(ranks, seed=seed)
    whole = [rank.path.read_bytes() for rank in ranks]
    rng = random.Random(7)
    for _ in range(60):
        clock = Clock()
        state = State(window_s=60, clock=clock)
        for _ in range(3):  # so that there are windows
            for rank, good in zip(ranks, whole, strict=True):
                bad = bytearray(good)
                for _ in range(rng.choice([1, 5, 50])):
                    place = rng.choice([rng.randrange(len(bad) - 8), rng.randrange(4096, 20_000)])
                    bad[place : place + 8] = rng.choice(
                        [rng.randbytes(8), b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"]
                    )
                rank.path.write_bytes(bad)
            seen = scraped(state, *OPTIONS)
            states = seen.by("state", "exporter_recordings")
            assert sum(states.values()) == 2
            assert len(seen.of("recorder_up")) == states["live"]
            clock.pass_by(60)


def test_layers_of_one_name_and_different_experts_are_not_summed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = Served(0, num_experts=8), Served(1, num_experts=16)
    for each in made:
        each.route_all(8)
    state = State()
    for _ in range(2):
        seen = scraped(state)
    assert set(seen.of("pass_max_over_mean_count").values()) == {1}
    assert caplog.text.count("has other experts than") == 2, "once for each of two layers"


@pytest.mark.parametrize("late_ms", [0, 3])
def test_who_waits_for_whom(late_ms: int) -> None:
    state = State()
    ranks = server(3, layers=2)
    state.update()
    for seed in range(5):
        work(ranks, seed=seed, late=1, late_ns=late_ms * 1_000_000)
        if seed == 2:
            state.tick()
    seen = scraped(state)
    for op in ("dispatch", "combine"):
        waited = seen.by("rank", "alltoall_wait_seconds_total", op=op)
        assert waited == {
            "0": pytest.approx(5 * 2 * late_ms / 1000),
            "1": 0,
            "2": pytest.approx(5 * 2 * late_ms / 1000),
        }
    assert scraped(state) == seen, "nothing is counted twice"


def test_a_transfer_that_is_not_everywhere_yet_is_counted_when_it_is() -> None:
    state = State()
    ranks = server(2, layers=1)
    state.update()
    matrix = [[1, 2], [3, 4]]
    for rank in ranks:
        rank.exchange(matrix, lasted_ns=1000)
    state.update()
    ranks[0].exchange(matrix, lasted_ns=5_001_000)
    assert scraped(state).one("alltoall_wait_seconds_total", rank=0) == 0
    ranks[1].exchange(matrix, lasted_ns=1_000)
    assert scraped(state).one("alltoall_wait_seconds_total", rank=0) == pytest.approx(0.005)


def test_waiting_is_absent_where_a_rank_is_not_seen_or_nobody_asked() -> None:
    watched, unwatched = State(), State(waits=False)
    ranks = server(2, layers=1)
    for state in (watched, unwatched):
        state.update()
    work(ranks)
    assert scraped(watched).of("alltoall_wait_seconds_total")
    assert scraped(unwatched).of("alltoall_seconds_total")
    assert scraped(unwatched).of("alltoall_wait_seconds_total") == {}
    received = scraped(watched).of("received_assignments_total")
    assert received
    assert scraped(unwatched).of("received_assignments_total") == received
    ranks.pop().path.unlink()
    alone = State()
    alone.update()
    ranks[0].exchange([[1, 2], [3, 4]])
    seen = scraped(alone)
    assert seen.of("alltoall_seconds_total")
    assert seen.of("alltoall_wait_seconds_total") == {}
