"""What opens above the table of the live view: a layer's detail, the choice of a source, the help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from dodoco_ext.views.top.frame import Choice, Frame
from dodoco_ext.views.top.text import detail_lines

if TYPE_CHECKING:
    from dodoco_ext.views.top.app import TopApp

HELP = """\
The line on top: the share of expert compute time that ranks spend waiting for
the hottest one, and how many times as fast expert compute would be with perfect
balance, where time is proportional to assignments: 1 - sum(mean) / sum(max).
  chance  what uniform routing of as many tokens would wait: statistics, no skew
  >=      passes were summed before the hottest rank was found: a lower bound
  One rank alone knows nothing of what others send it: experts stand for ranks.

gini      0: all experts alike, 1: one has all       floor  by uniform routing
corr      gini without what chance adds; 0: chance would do
max/mean  hottest expert over the mean               null   by uniform routing
          ! above what uniform routing reaches in 97.5 % of cases
hottest   experts and their share of the assignments
*         read in the middle of a pass: counters may disagree by that one
Blocks have one scale: a full one is the largest value of all layers.

[ ] 1..9  order by a column; the same digit again, or r, reverses
enter     all about a layer          esc  back; show all layers again
/         only layers of a name      s    another recording, or all ranks
w         window, or whole run       g    blocks: Gini, or tokens a second
p         pause                      q    quit
"""


class _Above(Screen[None]):
    """A page of text above the table."""

    CSS = "#page { text-wrap: nowrap; text-overflow: ellipsis; }"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,backspace", "app.pop_screen", "Back", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("j", "scroll(1)", show=False),
        Binding("k", "scroll(-1)", show=False),
    ]

    def compose(self) -> ComposeResult:
        """The text, which scrolls, and the keys."""
        with VerticalScroll():
            yield Static(id="page", markup=False)
        yield Footer(compact=True, show_command_palette=False)

    def action_scroll(self, lines: int) -> None:
        """Moves the text."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)


class HelpScreen(_Above):
    """What figures and keys mean."""

    def on_mount(self) -> None:
        """Shows it."""
        self.query_one("#page", Static).update(Text(HELP))


class DetailScreen(_Above):
    """All about one layer, kept up to date.

    Args:
        layer: Its full name.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p,space", "pause", "Pause"),
        Binding("w", "app.span", "Span"),
    ]

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer_name = layer

    @property
    def _top(self) -> TopApp:
        return self.app  # type: ignore[return-value]

    def on_mount(self) -> None:
        """Shows what there is."""
        self.show(self._top.frame)

    def on_resize(self) -> None:
        """Uses the new width."""
        self.show(self._top.frame)

    def action_pause(self) -> None:
        """Stops showing what is new, or goes on."""
        self._top.action_pause()

    def show(self, frame: Frame) -> None:
        """Shows a newer picture; where it lacks the layer, what was shown stays."""
        row = frame.row(self.layer_name)
        if row is None or not self.is_mounted:
            return
        lines = detail_lines(frame, row, self.app.size.width - 2)
        if self._top.paused:
            lines[0] = "PAUSED (p goes on) | " + lines[0]
        page = self.query_one("#page", Static)
        page.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))


class ChoiceScreen(Screen[Choice | None]):
    """The recordings there are.

    Args:
        choices: What may be chosen.
        current: What is looked at now.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back", key_display="esc"),
        Binding("enter", "select", "Look at it"),
    ]

    def __init__(self, choices: Sequence[Choice], current: Choice | None) -> None:
        super().__init__()
        self._choices = tuple(choices)
        self._current = current

    def compose(self) -> ComposeResult:
        """The list, and the keys."""
        yield Static(Text("Recordings, latest first; all ranks of a run are summed"))
        options = [Option(Text(choice.text, no_wrap=True)) for choice in self._choices]
        yield OptionList(*options)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Marks what is looked at."""
        places = [i for i, each in enumerate(self._choices) if each.means(self._current)]
        listed = self.query_one(OptionList)
        listed.focus()
        listed.highlighted = places[0] if places else (0 if self._choices else None)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._choices[event.option_index])

    def action_leave(self) -> None:
        """Leaves things as they are."""
        self.dismiss(None)
