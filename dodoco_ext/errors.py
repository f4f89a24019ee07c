"""The errors a user can meet. Every message is one line: what is wrong, and what to do."""

from __future__ import annotations


class DodocoError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(DodocoError, ValueError):
    """An argument, a setting or a file that cannot be used as given."""


class RecordingError(DodocoError):
    """A recording that cannot be read (or created) and why.

    Attributes:
        state: What the file is instead of a readable recording: `missing`, `creating` (its creator is
            at work), `unfinished` (its creator went before it was done), `foreign` (no recording),
            `version` (of another format version), `truncated`, `damaged` or `unreadable` (no
            permission, an I/O error). "" where no single file is at fault.
    """

    def __init__(self, message: str, state: str = "") -> None:
        super().__init__(message)
        self.state = state


class NothingToObserve(DodocoError):  # noqa: N818 - reads better where it is raised
    """A model in which no MoE router was found; the message says what was looked for."""
