"""What the exporter knows: one look at all recordings after another, by scrapes and by a clock of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dodoco_ext.views.exporter.identity import Key
from dodoco_ext.views.exporter.observe import KEEP_S, Look, Observer
from dodoco_ext.views.exporter.sums import Sums
from dodoco_ext.views.exporter.waits import Waits
from dodoco_ext.views.exporter.windows import Windows

log = logging.getLogger("dodoco")

TICK_S = 1.0
"""How often transfers are read without a scrape: rings must be read before they lap."""

LOOK_S = 15.0
"""How often recordings are looked for without a scrape."""

_LATE_S = 30.0


class State:
    """All that is counted. Its methods may be called by any thread.

    Args:
        folders: Where recordings are; None: the settings' folders.
        window_s: Length of the window of the window gauges.
        keep_s: How long a recording that ended is exposed.
        waits: Whether transfers are read one by one, for what only they say.
        clock: Unix time in ns.
    """

    def __init__(
        self,
        folders: Sequence[Path] | None = None,
        *,
        window_s: float = 60.0,
        keep_s: float = KEEP_S,
        waits: bool = True,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.lock = threading.RLock()
        self.sums = Sums()
        self.windows = Windows(window_s)
        self.waits = Waits()
        self.look = Look(0, (), (), {})
        self._placed: dict[tuple[Key, str], dict[int, float]] = {}
        self._reads_transfers = waits
        self._observer = Observer(folders, keep_s, clock)
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ticked = time.monotonic()

    def update(self) -> Look:
        """Looks at all recordings now."""
        with self.lock:
            self.look = self._observer.look()
            self.sums.update(self.look)
            self._placed = {}
            if self._reads_transfers:
                self.waits.update(self.look.time_ns, self.look.shown)
            else:
                self.waits.look_up_units(self.look.shown)
            if self.windows.is_due(self.look.time_ns):
                self.windows.end(self.look.time_ns, self.sums)
            return self.look

    def tick(self) -> None:
        """What has to be done every second: little, unless a window ends."""
        with self.lock:
            now = self._clock()
            if self.windows.is_due(now) or now - self.look.time_ns > LOOK_S * 1e9:
                self.update()
            elif self._reads_transfers:
                self.waits.update(self.look.time_ns, self.look.shown)

    def placed(self, key: Key, layer: str) -> dict[int, float]:
        """Assignments received by rank, as experts are placed; computed once a look."""
        place = (key, layer)
        if place not in self._placed:
            self._placed[place] = self.sums.received(key, layer)
        return self._placed[place]

    def start(self) -> None:
        """Starts the clock: a thread that looks every `TICK_S`."""
        self._thread = threading.Thread(target=self._tick, name="dodoco-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the clock."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def problem(self) -> str:
        """Why metrics cannot be relied upon; "" if they can."""
        if self._thread is not None and time.monotonic() - self._ticked > _LATE_S:
            return f"no look at the recordings for {_LATE_S:g} s"
        return self.look.problem

    def _tick(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                self.tick()
                self._ticked = time.monotonic()
            except Exception:  # seen at /healthz if it goes on
                log.exception("looking at the recordings failed")
