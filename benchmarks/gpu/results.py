"""What was measured, in a JSON file that is whole at every moment: a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """Figures by name, kept in a file.

    Args:
        path: The JSON file; read if it is there.
        key: What the figures belong to, such as a commit. Those of another key are forgotten.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.values: dict[str, Any] = {}
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except ValueError:
            stored = {}  # not ours, or from a disk that was full
        if isinstance(stored, dict) and stored.get("key") == key:
            self.values = dict(stored["values"])

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def put(self, name: str, value: Any) -> None:
        """Stores one figure, on disk when this returns."""
        self.values[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"key": self.key, "values": self.values}, indent=1))

    def forget(self, name: str) -> None:
        """Takes a figure out, if it is there."""
        if name in self.values:
            del self.values[name]
            write_whole(self.path, json.dumps({"key": self.key, "values": self.values}, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that others see either as it was or whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)
