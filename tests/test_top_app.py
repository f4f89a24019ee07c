"""The live view in a terminal: driven by Textual's own pilot, and once in a real tmux."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("textual", reason="textual is not installed: pip install 'dodoco-ext[top]'")
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, OptionList

import planted
import runs
from dodoco_ext.views.top.app import TopApp
from dodoco_ext.views.top.columns import COLUMNS, ordered
from dodoco_ext.views.top.session import Session

pytestmark = pytest.mark.timeout(120)

SPECS = planted.layers(30, 16, 2)
Drive = Callable[[Pilot[None], TopApp], Awaitable[None]]


def drive(act: Drive, *, source: str | None = None, size: tuple[int, int] = (80, 24)) -> None:
    """Runs the view without a terminal; it looks only when told to."""

    async def main() -> None:
        app = TopApp(Session(source), interval_s=None)
        async with app.run_test(size=size) as pilot:
            await look(pilot, app)
            await act(pilot, app)

    asyncio.run(main())


async def look(pilot: Pilot[None], app: TopApp) -> None:
    await app.look_once()
    await pilot.pause()


async def press(pilot: Pilot[None], *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


def screen_of(app: TopApp) -> list[str]:
    """What is on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip).rstrip() for strip in strips]


def order(app: TopApp) -> list[str]:
    """Names in the first column, from the top."""
    table = app.screen_stack[0].query_one(DataTable)
    return [str(table.get_cell_at((row, 0))).strip() for row in range(table.row_count)]  # type: ignore[arg-type]


@pytest.fixture
def ranks() -> list[planted.Planted]:
    """Two live ranks with something in their first window."""
    made = [runs.rank_of(rank, 2, SPECS) for rank in range(2)]
    for number, rank in enumerate(made):
        rank.route_all([20, 5], skew=0.5, seed=number)
    return made


def test_it_shows_cost_status_and_layers_in_80_by_24(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        lines = screen_of(app)
        assert len(lines) == 24
        assert lines[0].startswith("Ranks wait >= ")
        assert "contiguous experts assumed" in lines[1]
        assert lines[2].startswith("job | 2 ranks: 2 live | 30 layers")
        heads = next(line for line in lines if "max/mean" in line)
        assert all(column.title in heads for column in COLUMNS if column.title != "trend")
        assert "? Help" in lines[-1]

    drive(act)


def test_it_waits_for_a_recording_and_then_shows_it(recordings: Path) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        assert screen_of(app)[0].startswith("No recording yet; looking in /")
        await press(pilot, "enter", "s", "escape", "w", "2")  # nothing to act on, nothing happens
        planted.Planted(SPECS).route_all([4])
        await look(pilot, app)
        assert len(order(app)) == 30

    drive(act)


@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_digits_order_by_a_column_and_once_more_reverse(
    column: int, ranks: list[planted.Planted]
) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "2" if column != 1 else "3", str(column + 1))
        assert order(app) == [row.short for row in ordered(app.frame.rows, column)]
        await press(pilot, str(column + 1))
        assert order(app) == [row.short for row in ordered(app.frame.rows, column, reverse=True)]
        assert app.screen.query_one(DataTable).cursor_row == 0

    drive(act)


def test_brackets_walk_over_the_columns_and_r_reverses(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "right_square_bracket")
        assert order(app) == [row.short for row in ordered(app.frame.rows, 1)]
        await press(pilot, "left_square_bracket", "left_square_bracket")
        assert app.sorted_by == len(COLUMNS) - 1
        await press(pilot, "1", "r")
        assert order(app)[0] == "29"

    drive(act)


def test_the_cursor_stays_at_its_layer_when_the_order_changes(
    ranks: list[planted.Planted],
) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "2", "down", "down", "down")
        assert app.selected is not None
        name, before = app.selected.name, order(app)
        for seed in range(3):
            ranks[0].route_all([200], skew=0.3, seed=seed + 10)
            await look(pilot, app)
        assert order(app) != before
        assert app.selected.name == name

    drive(act)


def test_a_pause_shows_what_was_and_the_counts_go_on(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "w", "p")
        before = screen_of(app)
        assert "PAUSED" in before[2]
        ranks[0].route_all([100])
        await look(pilot, app)
        assert screen_of(app) == before
        await press(pilot, "p")
        await look(pilot, app)
        assert app.frame.rows[0].tokens == 150
        assert "PAUSED" not in screen_of(app)[2]

    drive(act)


def test_enter_shows_a_layer_and_keeps_it_up_to_date(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "down", "enter")
        assert screen_of(app)[0].startswith("model.layers.1.mlp.gate: top 2 of 16 experts")
        assert "50 tokens" in screen_of(app)[1]
        ranks[0].route_all([100])
        await look(pilot, app)
        assert "100 tokens" in screen_of(app)[1], "the window begins at the first look"
        await press(pilot, "w")
        assert "150 tokens" in screen_of(app)[1]
        await press(pilot, "2", "slash", "escape")  # the table's keys do nothing here
        assert len(app.screen_stack) == 1
        assert app.sorted_by == 0

    drive(act)


def test_a_filter_leaves_the_layers_of_a_name(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "slash", "full_stop", "2", "full_stop")
        assert order(app) == ["2"]
        await press(pilot, "enter")
        assert app.screen.focused is app.screen.query_one(DataTable)
        await press(pilot, "slash", "backspace")
        assert order(app) == ["2", *map(str, range(20, 30))]
        await press(pilot, "escape")
        assert len(order(app)) == 30
        assert app.screen.query_one("#filter", Input).value == ""

    drive(act)


def test_another_recording_can_be_chosen(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "s")
        assert app.screen.query_one(OptionList).option_count == 3
        await press(pilot, "down", "enter")
        assert "rank 1" in screen_of(app)[2]
        assert app.frame.rows[0].tokens == 25
        await press(pilot, "s", "escape")
        assert "rank 1" in screen_of(app)[2]

    drive(act)


def test_g_shows_tokens_over_time(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "g")
        assert any("tok/s ->" in line for line in screen_of(app))

    drive(act)


def test_help_fits_80_columns_and_says_every_key(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        await press(pilot, "question_mark")
        text = "\n".join(screen_of(app))
        assert "1 - sum(mean) / sum(max)" in text
        assert "quit" in text
        await press(pilot, "escape")
        assert screen_of(app)[0].startswith("Ranks wait")

    drive(act)


def test_it_follows_the_size_of_the_terminal(ranks: list[planted.Planted]) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        narrow = next(line for line in screen_of(app) if line.startswith("0 "))
        for size in ((160, 50), (80, 24), (40, 10), (200, 60)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            lines = screen_of(app)
            assert len(lines) == size[1]
            assert all(len(line) <= size[0] for line in lines)
        wide = next(line for line in screen_of(app) if line.startswith("0 "))
        assert (wide.count("%"), narrow.count("%")) == (3, 2)

    drive(act)


def test_an_error_of_ours_is_told_and_the_view_goes_on(
    ranks: list[planted.Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(pilot: Pilot[None], app: TopApp) -> None:
        def fail(now_s: float | None = None) -> None:
            raise ZeroDivisionError("planted")

        with monkeypatch.context() as patch:
            patch.setattr(app.session, "look", fail)
            await look(pilot, app)
        assert any("tried again: ZeroDivisionError: planted" in line for line in screen_of(app))
        assert len(order(app)) == 30
        await look(pilot, app)
        assert not any("planted" in line for line in screen_of(app))

    drive(act)


def test_the_picture_of_the_readme_can_be_made(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "top_picture.py"
    out = tmp_path / "new" / "top.svg"
    command = [sys.executable, str(script), str(out), "--size", "80", "24"]
    subprocess.run(command, check=True, timeout=100)
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "Ranks&#160;wait" in text
    for each in (text, (script.parents[1] / "docs/images/top.svg").read_text(encoding="utf-8")):
        assert "font-face" not in each, "a picture loads nothing"
        assert not re.search(r"url\((?!#)|href=", each)
        assert str(tmp_path) not in each
        assert str(script.parents[1]) not in each


def test_it_looks_by_itself() -> None:
    async def main() -> None:
        recording = planted.Planted(SPECS)
        app = TopApp(Session(), interval_s=0.1)
        async with app.run_test(size=(80, 24)) as pilot:
            for _ in range(200):
                recording.route_all([1])
                await pilot.pause(0.05)
                if app.frame.span.startswith("last"):
                    return
        raise AssertionError("nothing was seen in ten seconds")

    asyncio.run(main())


# ---- a real terminal -----------------------------------------------------------------------------

TMUX = shutil.which("tmux")
WRITER = """
import sys, time, planted
p = planted.Planted(planted.layers(4, 16, 2))
print(p.path, flush=True)
seed = 0
while True:
    p.route_all([16], skew=0.5, seed=seed)
    seed += 1
    time.sleep(0.1)
"""


class Terminal:
    """A tmux server of the test's own, with one window of 80 x 24."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._base = [str(TMUX), "-S", str(folder / "tmux"), "-f", os.devnull]
        self._environment = environment

    def run(self, command: str) -> None:
        self._tmux("new-session", "-d", "-x", "80", "-y", "24", command)

    def send(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait_for(self, pattern: str, seconds: float = 30.0) -> str:
        """The screen once it matches."""
        end, text = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            text = self.text()
            if re.search(pattern, text):
                return text
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} on the screen:\n{text}")

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def end(self) -> None:
        subprocess.run([*self._base, "kill-server"], capture_output=True, check=False)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._base, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    if TMUX is None:
        pytest.skip("tmux is not installed: apt-get install tmux")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    made = Terminal(tmp_path, environment)
    yield made
    made.end()


def test_in_a_real_terminal(terminal: Terminal) -> None:
    terminal.run(f"{sys.executable} -m dodoco_ext top --interval 0.2; echo ended with $?; sleep 60")
    terminal.wait_for(r"No recording yet; looking in /")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
    ) as writer:
        try:
            terminal.wait_for(r"One rank, by expert: \d+\.\d % waiting")
            terminal.wait_for(r"rank 0: live \| 4 layers .* last \d")
            terminal.send("2")
            terminal.wait_for(r"vgini")
            terminal.send("Enter")
            terminal.wait_for(r"Experts, hottest first|Last passes")
            terminal.send("Escape")
            terminal.wait_for(r"vgini")
            terminal.resize(120, 30)
            terminal.wait_for(r"0 +0\.\d{3}.*%.*%.*%")
        finally:
            writer.kill()
    terminal.wait_for(r"Ended, killed: the last state is kept")
    terminal.send("q")
    assert "Traceback" not in terminal.wait_for("ended with 0")
