"""The errors a user can meet. Every message is one line: what is wrong, and what to do."""

from __future__ import annotations


class DodocoError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(DodocoError, ValueError):
    """An argument, a setting or a file that cannot be used as given."""


class RecordingError(DodocoError):
    """A recording that cannot be read (or created) and why."""


class NothingToObserve(DodocoError):  # noqa: N818 - reads better where it is raised
    """A model in which no MoE router was found; the message says what was looked for."""
