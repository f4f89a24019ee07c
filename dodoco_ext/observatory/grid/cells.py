"""Cells on disk: what one model did with one condition, sequence by sequence. The unit of resuming.

A cell is a NumPy archive of `counts`, `losses` and `meta` (JSON). It is written to another name,
synchronised and renamed: a cell exists whole or not at all. `meta` carries a digest of the numbers
and everything that determines them (`Cell.key`), so that a damaged cell, or one of another model,
text, seed, shape or version, is told from a good one.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import DodocoError
from dodoco_ext.observatory.whole import write_whole

SCHEMA = "dodoco.cell/1"
Key = dict[str, Any]


class BadCellError(DodocoError):
    """A cell's file is damaged, or belongs to another grid."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One model under one condition.

    Attributes:
        model: Name of the model.
        name, kind, source, description: As in `conditions.Condition`.
        counts: int32 [draws, sequences, layers, experts]; assignments of each sequence.
        losses: float64 [draws, sequences]; cost of a token, nats.
        top_k: k of each layer.
        layer_names: Qualified name of each router.
        key: What determines the numbers; JSON.
        facts: What is known of model and machine, which does not determine them; JSON.
    """

    model: str
    name: str
    kind: str
    source: str
    description: str
    counts: NDArray[np.int32]
    losses: NDArray[np.float64]
    top_k: list[int]
    layer_names: list[str]
    key: Key
    facts: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of counts and losses, little-endian."""
        digest = hashlib.sha256(self.counts.astype("<i4").tobytes())
        digest.update(self.losses.astype("<f8").tobytes())
        return digest.hexdigest()


def file_name(model: str, condition: str) -> str:
    """Name of a cell's file."""
    return f"{_plain(model)}--{_plain(condition)}.npz"


def write(cell: Cell, path: Path) -> None:
    """Writes a cell, whole or not at all.

    Raises:
        OSError: It cannot be written (a full disk, for one); nothing is left of it.
    """
    meta = {
        "schema": SCHEMA,
        "model": cell.model,
        "condition": cell.name,
        "kind": cell.kind,
        "source": cell.source,
        "description": cell.description,
        "top_k": cell.top_k,
        "layer_names": cell.layer_names,
        "sha256": cell.sha256,
        "key": cell.key,
        "facts": cell.facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file, counts=cell.counts, losses=cell.losses, meta=np.array(json.dumps(meta))
        )


def read(path: Path) -> Cell:
    """Reads a cell and checks its digest.

    Raises:
        FileNotFoundError: There is none.
        BadCellError: It is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(str(archive["meta"]))
            counts, losses = archive["counts"], archive["losses"]
        if meta["schema"] != SCHEMA:
            raise BadCellError(f"{path.name} is of schema {meta['schema']}, not {SCHEMA}")
        cell = Cell(
            model=meta["model"],
            name=meta["condition"],
            kind=meta["kind"],
            source=meta["source"],
            description=meta["description"],
            counts=counts,
            losses=losses,
            top_k=meta["top_k"],
            layer_names=meta["layer_names"],
            key=meta["key"],
            facts=meta["facts"],
        )
    except (FileNotFoundError, PermissionError, BadCellError):
        raise
    except Exception as error:  # whatever zipfile, zlib, json and numpy make of damaged bytes
        raise BadCellError(f"{path.name} is damaged ({type(error).__name__})") from None
    if cell.sha256 != meta["sha256"]:
        raise BadCellError(f"{path.name} is damaged (its numbers do not match their digest)")
    return cell


def read_wanted(path: Path, key: Key) -> Cell:
    """Reads a cell that must be the one wanted.

    Raises:
        FileNotFoundError: There is none.
        BadCellError: It is damaged, or something that determines the numbers is another.
    """
    cell = read(path)
    if other := [name for name in sorted({*key, *cell.key}) if cell.key.get(name) != key.get(name)]:
        raise BadCellError(f"{path.name} was made with another {', '.join(other)}")
    return cell


def _plain(name: str) -> str:
    """A name as part of a file's name; one that loses more than spaces and colons ends in a digest."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "cell"
    if len(plain) <= 60 and plain == name.replace(" ", "-").replace(":", "-"):
        return plain
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
