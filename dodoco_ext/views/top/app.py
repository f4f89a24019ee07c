"""The live view in a terminal: keys, table, layer detail. Textual draws it."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static

from dodoco_ext.views.tables import plain
from dodoco_ext.views.top.columns import COLUMNS, Layout, matching, ordered
from dodoco_ext.views.top.figures import Row
from dodoco_ext.views.top.frame import Choice, Frame
from dodoco_ext.views.top.screens import ChoiceScreen, DetailScreen, HelpScreen
from dodoco_ext.views.top.session import Session

MOST_NOTES = 3
_OF_TABLE = frozenset(
    ("detail", "sort", "sort_by", "reverse", "filter", "unfilter", "choose", "line", "help")
)


class TopApp(App[None]):
    """The live view.

    Args:
        session: What it shows.
        interval_s: Seconds from one look to the next; None: only when `look_once()` is called.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "dodoco top"
    # Nothing is said by colour alone, and no red beside green.
    CSS = """
    Screen { layout: vertical; }
    Screen > Static { text-wrap: nowrap; text-overflow: ellipsis; }
    #cost { height: 1; text-style: bold reverse; }
    #scope, #status { height: 1; }
    #notes { height: auto; max-height: 3; text-style: italic; }
    #filter { display: none; height: 1; border: none; padding: 0; }
    #filter.shown { display: block; }
    DataTable { height: 1fr; scrollbar-size-vertical: 1; overflow-x: hidden; }
    DataTable > .datatable--header { text-style: bold underline; }
    DataTable > .datatable--cursor { text-style: reverse; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p,space", "pause", "Pause"),
        Binding("enter", "detail", "Layer", show=True),
        Binding("left_square_bracket,less_than_sign", "sort_by(-1)", "Sort", key_display="[ ]"),
        Binding("right_square_bracket,greater_than_sign", "sort_by(1)", "Sort", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("s", "choose", "Source"),
        Binding("w", "span", "Span"),
        Binding("g", "line", "Blocks"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("escape", "unfilter", show=False),
        *(Binding(str(i + 1), f"sort({i})", show=False) for i in range(len(COLUMNS))),
    ]

    def __init__(self, session: Session, interval_s: float | None = 1.0) -> None:
        super().__init__()
        self.session = session
        self.interval_s = interval_s
        self.frame = Frame("Looking for recordings ...")
        self.paused = False
        self.sorted_by = 0
        self.reverse = False
        self.tokens_line = False
        self.filter_text = ""
        self.failure = ""
        self.shown: list[str] = []
        self._can_draw = False
        self._looking = asyncio.Lock()
        self._wanted: Choice | None = None
        self._layout_drawn: tuple[object, ...] = ()
        self._cells: dict[str, tuple[str, ...]] = {}

    def compose(self) -> ComposeResult:
        """The lines above, the table, the filter and the keys."""
        yield Static(id="cost", markup=False)
        yield Static(id="scope", markup=False)
        yield Static(id="status", markup=False)
        yield Static(id="notes", markup=False)
        yield DataTable(id="layers", cursor_type="row", cell_padding=0, zebra_stripes=False)
        yield Input(
            id="filter", placeholder="part of a layer's name", compact=True, select_on_focus=False
        )
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begins to look."""
        self.query_one(DataTable).focus()
        self._can_draw = True
        self._draw()
        if self.interval_s is not None:
            self.run_worker(self._keep_looking(self.interval_s), exit_on_error=False)

    async def _keep_looking(self, interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.look_once()
            await asyncio.sleep(max(interval_s - (loop.time() - began), 0.05))

    async def look_once(self) -> None:
        """Looks once, beside the terminal's own work, and shows what there is."""
        async with self._looking:
            if self._wanted is not None:
                self.session.choose(self._wanted)
                self._wanted = None
            try:
                frame = await asyncio.to_thread(self.session.look)
            except Exception as error:
                # A live view must not fall over: it says so, keeps what it showed, and looks again.
                self.failure = plain(
                    f"Looking failed, tried again: {type(error).__name__}: {error}"
                )
                self._draw()
                return
            self.failure = ""
        if not self.paused:
            self.frame = frame
            self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of the table do nothing while something else is above it."""
        return action not in _OF_TABLE or len(self.screen_stack) == 1

    # ---- keys ---------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Stops showing what is new, or goes on; it is counted meanwhile."""
        self.paused = not self.paused
        self._draw()

    def action_sort(self, column: int) -> None:
        """Orders by a column; once more reverses."""
        self.reverse = not self.reverse if column == self.sorted_by else False
        self.sorted_by = column
        self._draw(to_top=True)

    def action_sort_by(self, step: int) -> None:
        """Orders by the next column or the one before."""
        self.sorted_by = (self.sorted_by + step) % len(COLUMNS)
        self.reverse = False
        self._draw(to_top=True)

    def action_reverse(self) -> None:
        """Turns the order round."""
        self.reverse = not self.reverse
        self._draw(to_top=True)

    def action_line(self) -> None:
        """Shows tokens a second over time instead of Gini, or the other way round."""
        self.tokens_line = not self.tokens_line
        self._draw()

    async def action_span(self) -> None:
        """Shows the whole run instead of the window, or the other way round."""
        self.session.whole_run = not self.session.whole_run
        await self.look_once()

    def action_filter(self) -> None:
        """Asks for a part of a layer's name."""
        entry = self.query_one("#filter", Input)
        entry.add_class("shown")
        entry.focus()

    def action_unfilter(self) -> None:
        """Shows all layers again."""
        entry = self.query_one("#filter", Input)
        entry.value = ""
        self._leave_filter()

    def action_choose(self) -> None:
        """Lists what may be looked at."""
        self.push_screen(ChoiceScreen(self.frame.choices, self.frame.choice), self._chosen)

    def action_help(self) -> None:
        """Says what the figures and keys mean."""
        self.push_screen(HelpScreen())

    def action_detail(self) -> None:
        """Shows all about the layer under the cursor."""
        row = self.selected
        if row is not None:
            self.push_screen(DetailScreen(row.name))

    @property
    def selected(self) -> Row | None:
        """The layer under the cursor."""
        place = self.query_one(DataTable).cursor_row
        return self.frame.row(self.shown[place]) if 0 <= place < len(self.shown) else None

    @on(DataTable.RowSelected)
    def _row_selected(self) -> None:
        self.action_detail()

    @on(DataTable.HeaderSelected)
    def _header_selected(self, event: DataTable.HeaderSelected) -> None:
        self.action_sort(event.column_index)

    @on(Input.Changed, "#filter")
    def _filtered(self, event: Input.Changed) -> None:
        self.filter_text = event.value
        self._draw()

    @on(Input.Submitted, "#filter")
    def _leave_filter(self) -> None:
        self.query_one("#filter", Input).remove_class("shown")
        self.query_one(DataTable).focus()

    async def _chosen(self, choice: Choice | None) -> None:
        if choice is not None:
            self._wanted = choice
            self.paused = False
            await self.look_once()

    def on_resize(self) -> None:
        """Uses the new width."""
        self.call_after_refresh(self._draw)

    # ---- drawing ------------------------------------------------------------------------------

    def _draw(self, *, to_top: bool = False) -> None:
        if not self._can_draw:
            return
        frame, main = self.frame, self.screen_stack[0]
        cost = frame.waiting or frame.cost.text
        scope = f"({frame.cost.scope})" if frame.cost.scope and not frame.waiting else ""
        status = ("PAUSED (p goes on) | " if self.paused else "") + frame.status
        said = (self.failure, *frame.notes) if self.failure else frame.notes
        notes = "\n".join(said[:MOST_NOTES])
        for name, text in (("cost", cost), ("scope", scope), ("status", status), ("notes", notes)):
            main.query_one(f"#{name}", Static).update(Text(text, no_wrap=True, overflow="ellipsis"))
        main.query_one("#notes").display = bool(notes)
        table = main.query_one(DataTable)
        self._draw_table(table)
        if to_top:
            table.move_cursor(row=0, animate=False)
        for screen in self.screen_stack[1:]:
            if isinstance(screen, DetailScreen):
                screen.show(frame)

    def _draw_table(self, table: DataTable[Text]) -> None:
        rows = ordered(
            matching(self.frame.rows, self.filter_text), self.sorted_by, reverse=self.reverse
        )
        layout = Layout.of(self.size.width - 1, self.frame.rows, tokens=self.tokens_line)
        largest = layout.largest(self.frame.rows)
        cells = {row.name: layout.cells(row, largest) for row in rows}
        titles = layout.titles(self.sorted_by, reverse=self.reverse)
        drawn = (layout, titles, list(cells))
        if drawn != self._layout_drawn:
            self._refill(table, layout, titles, cells)
            self._layout_drawn = drawn
        else:
            for name, texts in cells.items():
                for index, text in enumerate(texts):
                    if self._cells[name][index] != text:
                        table.update_cell(name, str(index), Text(text))
        self._cells = cells

    def _refill(
        self,
        table: DataTable[Text],
        layout: Layout,
        titles: tuple[str, ...],
        cells: dict[str, tuple[str, ...]],
    ) -> None:
        """Fills the table anew; the cursor stays at its layer."""
        place = table.cursor_row
        at = self.shown[place] if 0 <= place < len(self.shown) else None
        table.clear(columns=True)
        for index, (title, width) in enumerate(zip(titles, layout.widths, strict=True)):
            table.add_column(Text(title), width=width, key=str(index))
        for name, texts in cells.items():
            table.add_row(*(Text(text) for text in texts), key=name)
        self.shown = list(cells)
        if at in cells:
            table.move_cursor(row=self.shown.index(at), animate=False)
