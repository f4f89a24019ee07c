"""Where the lanes of a recording are: on the host, and on its devices."""

from __future__ import annotations

from collections.abc import Sequence

from dodoco_ext import _C
from dodoco_ext.errors import InputError

# Lanes of a device where nobody asked for more: one for the stream that runs the model, one for the
# stream that captures it.
DEVICE_LANES = 2


def lanes_of(devices: Sequence[str], lanes: int | None) -> list[str]:
    """The place of every lane: the host's first, then device by device.

    Args:
        devices: Where layers are: `cpu`, `cuda:0` and so on.
        lanes: Lanes that somebody asked for, on each of them; None: what running a model takes.

    Raises:
        InputError: A device or the number of lanes cannot be used.
    """
    if not devices:
        raise InputError("devices=(): name at least one, as in ('cpu',)")
    others = sorted(set(devices) - {"cpu"}, key=lambda name: (len(name), name))
    for name in others:
        if not name.removeprefix("cuda:").isdigit():
            raise InputError(f"device {name!r}: give 'cpu' or 'cuda:N'")
    on_host, most = "cpu" in devices, _C.MAX_LANES // len({*devices})
    if lanes is not None and not 1 <= lanes <= most:
        where = f" with {len({*devices})} devices" if len({*devices}) > 1 else ""
        raise InputError(f"lanes={lanes}: give 1 to {most}{where}")
    places = ["cpu"] * (lanes or 1) if on_host else []
    each = max(lanes or 1, min(DEVICE_LANES, (_C.MAX_LANES - len(places)) // max(len(others), 1)))
    places += [name for name in others for _ in range(each)]
    if len(places) > _C.MAX_LANES:
        raise InputError(
            f"{len(places)} lanes for {', '.join(devices)}: {_C.MAX_LANES} are possible"
        )
    return places


def names_of(places: Sequence[str]) -> list[str]:
    """What lanes are called in a recording: `host`, `host 1`, `cuda:0`, `cuda:0 1`."""
    numbers = [places[:index].count(place) for index, place in enumerate(places)]
    names = ["host" if place == "cpu" else place for place in places]
    return [f"{name} {n}" if n else name for name, n in zip(names, numbers, strict=True)]
