"""Snapshots as files: saved, loaded again whatever the file holds, and subtracted."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.counters import ARRAYS, COUNTERS, LayerSnapshot, Snapshot
from dodoco_ext.errors import InputError

SCHEMA = "dodoco.snapshot/1"

MAX_BYTES = 32 << 20
"""Longest file that is read: parsed, it may take 20 times as much memory."""

MAX_EXPERTS = 65536
MAX_LAYERS = 65536

_HISTOGRAMS = {
    "gini_histogram": (_C.SIZE_CLASSES, _C.GINI_BINS),
    "max_over_mean_histogram": (_C.SIZE_CLASSES, _C.MAX_MEAN_BINS),
}
_WORD = (1 << 64) - 1


def save_snapshot(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Writes a snapshot as JSON, exact and readable by its owner only.

    Whoever reads the file meanwhile finds the old or the new one, whole. Only a saved snapshot is
    replaced.

    Raises:
        InputError: The file cannot be written, is something else, or would be longer than
            `load_snapshot` reads.
    """
    target = Path(path)
    if os.path.lexists(target) and not looks_saved(target):
        raise InputError(f"{target} is there, and no saved snapshot: give another name")
    text = json.dumps(
        {
            "schema": SCHEMA,
            "recording": snapshot.recording,
            "time_ns": snapshot.time_ns,
            "start_ns": snapshot.start_ns,
            "layers": [_layer_dict(layer) for layer in snapshot.layers],
        },
        allow_nan=False,
    )
    if len(text) > MAX_BYTES:
        raise InputError(f"{target}: the snapshot takes {len(text)} bytes, more than {MAX_BYTES}")
    try:
        _replace(target, text + "\n")
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}; check the path and its permissions"
        ) from None


def load_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Reads a saved snapshot and checks all of it.

    Raises:
        InputError: The file cannot be read or is no snapshot; the message names the file and what is
            wrong.
    """
    source = Path(path)
    text = _read(source)
    try:
        data = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{source} is not a saved snapshot: {error}") from None
    try:
        return _snapshot(data)
    except _Wrong as error:
        raise InputError(
            f"{source} is not a saved snapshot: {error}; make one with `dodoco show --save FILE`"
        ) from None


def difference(now: Snapshot, earlier: Snapshot, name: str = "the earlier snapshot") -> Snapshot:
    """`now - earlier` for a snapshot out of a file, which may say anything.

    Raises:
        InputError: They are of two recordings, or `earlier` holds what cannot have come before `now`.
    """
    if now.recording != earlier.recording:
        raise InputError(
            f"{name} is of recording {earlier.recording[:8]}, not of {now.recording[:8]}: give a "
            "snapshot of the same recording, or compare the two with --against"
        )
    if shape(now) != shape(earlier):
        raise InputError(
            f"{name} has other layers than its recording: it was changed; save it anew"
        )
    for a, b in zip(now.layers, earlier.layers, strict=True):
        falls = [field for field in COUNTERS if getattr(a, field) < getattr(b, field)]
        falls += [field for field in ARRAYS if (getattr(a, field) < getattr(b, field)).any()]
        if falls or now.time_ns < earlier.time_ns:
            what = f"{falls[0]} of layer {a.name!r}" if falls else "the time"
            raise InputError(f"{name} is later than the recording ({what}): swap them")
    return now - earlier


def shape(snapshot: Snapshot) -> list[tuple[str, int, int]]:
    """Name, num_experts and top_k of every layer."""
    return [(layer.name, layer.num_experts, layer.top_k) for layer in snapshot.layers]


def looks_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file is rather a saved snapshot than a recording: it begins with a brace."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(16).lstrip().startswith(b"{")
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return False


class _Wrong(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with the content of a file."""


def _replace(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".dodoco-snapshot-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _layer_dict(layer: LayerSnapshot) -> dict[str, Any]:
    scalars = ("index", "name", "num_experts", "top_k", *COUNTERS, "in_flight")
    return {
        **{name: getattr(layer, name) for name in scalars},
        **{name: getattr(layer, name).tolist() for name in ARRAYS},
    }


def _read(path: Path) -> bytes:
    try:
        # Non-blocking: a FIFO of that name must not hang the reader.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise InputError(f"{path} is not a file: give a saved snapshot")
            data = file.read(MAX_BYTES + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot read the snapshot {path}: {reason}; make one with `dodoco show --save FILE`"
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is not a saved snapshot: longer than {MAX_BYTES} bytes")
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a count")


def _snapshot(data: Any) -> Snapshot:
    top = _object(data, "the file")
    schema = top.get("schema")
    if schema != SCHEMA:
        raise _Wrong(f"schema is {_short(schema)}, not {SCHEMA!r}")
    recording = top.get("recording")
    if not isinstance(recording, str) or not _is_uuid(recording):
        raise _Wrong(f"recording is {_short(recording)}, not 32 hexadecimal digits")
    layers = top.get("layers")
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise _Wrong("layers is not a list of layers")
    return Snapshot(
        recording=recording,
        time_ns=_integer(top, "time_ns", "the file"),
        start_ns=_integer(top, "start_ns", "the file"),
        layers=tuple(_layer(index, layer) for index, layer in enumerate(layers)),
    )


def _layer(index: int, data: Any) -> LayerSnapshot:
    where = f"layer {index}"
    layer = _object(data, where)
    name, in_flight = layer.get("name"), layer.get("in_flight")
    if not isinstance(name, str):
        raise _Wrong(f"name of {where} is {_short(name)}, not a text")
    if not isinstance(in_flight, bool):
        raise _Wrong(f"in_flight of {where} is {_short(in_flight)}, not true or false")
    num_experts = _integer(layer, "num_experts", where)
    top_k = _integer(layer, "top_k", where)
    if not 1 <= num_experts <= MAX_EXPERTS or top_k > num_experts:
        raise _Wrong(f"{where} has top {top_k} of {num_experts} experts")
    if _integer(layer, "index", where) != index:
        raise _Wrong(f"{where} has index {layer['index']}")
    values: dict[str, Any] = {field: _integer(layer, field, where) for field in COUNTERS}
    values["counts"] = _array(layer, "counts", where, num_experts)
    for field, (rows, columns) in _HISTOGRAMS.items():
        row_list = layer.get(field)
        if not isinstance(row_list, list) or len(row_list) != rows:
            raise _Wrong(f"{field} of {where} is not {rows} rows")
        each = [_array({field: row}, field, where, columns) for row in row_list]
        values[field] = np.stack(each)
    if not in_flight and sum(values["counts"].tolist()) != values["assignments"]:
        raise _Wrong(f"counts of {where} do not add up to its assignments")
    return LayerSnapshot(
        index=index,
        name=name,
        num_experts=num_experts,
        top_k=top_k,
        in_flight=in_flight,
        **values,
    )


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is {_short(value)}, not an object")
    return value


def _integer(holder: dict[str, Any], name: str, where: str) -> int:
    value = holder.get(name)
    if type(value) is not int or not 0 <= value <= _WORD:
        raise _Wrong(f"{name} of {where} is {_short(value)}, not a count from 0 to 2^64 - 1")
    return value


def _array(holder: dict[str, Any], name: str, where: str, length: int) -> NDArray[np.uint64]:
    values = holder.get(name)
    if not isinstance(values, list) or len(values) != length:
        raise _Wrong(f"{name} of {where} is not a list of {length} counts")
    if not all(type(value) is int and 0 <= value <= _WORD for value in values):
        wrong = next(v for v in values if type(v) is not int or not 0 <= v <= _WORD)
        raise _Wrong(f"{name} of {where} holds {_short(wrong)}, not a count from 0 to 2^64 - 1")
    return np.array(values, np.uint64)


def _is_uuid(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def _short(value: Any) -> str:
    """A value of any size for a message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
