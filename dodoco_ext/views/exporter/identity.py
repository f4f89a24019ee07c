"""Which labels a recording has: stable over restarts of the process that records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dodoco_ext.recording import Reader
from dodoco_ext.transfers import Group

_LONGEST = 120
UNKNOWN, NO_GROUP = "unknown", "none"


@dataclass(frozen=True, order=True)
class Key:
    """A group of ranks of a model: what is summed over ranks has these labels."""

    model_name: str
    ep_group: str


@dataclass(frozen=True, order=True)
class Identity:
    """A rank of such a group. The recording of its restarted process has the same."""

    key: Key
    rank: int

    @property
    def labels(self) -> tuple[str, str, str]:
        """Values of `model_name`, `ep_group`, `rank`."""
        return (self.key.model_name, self.key.ep_group, str(self.rank))


def identity_of(reader: Reader) -> Identity:
    """The identity of a recording, from its labels `model_name` and `ep_group`, its group and its rank."""
    given = reader.metadata.get("labels")
    labels = given if isinstance(given, dict) else {}
    model = text(labels.get("model_name")) or UNKNOWN
    group = text(labels.get("ep_group")) or _name_of(reader.group)
    return Identity(Key(model, group), int(reader.header["rank"]))


def text(value: object) -> str:
    """Text from a file as a label's value: printable, encodable, of bounded length; "" if it is none."""
    if not isinstance(value, str):
        return ""
    shown = "".join(c if c.isprintable() else "?" for c in value)
    if len(shown) > _LONGEST:
        digest = hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()[:8]
        shown = f"{shown[: _LONGEST - 9]}~{digest}"
    return shown


def layer_labels(reader: Reader) -> list[str]:
    """The value of `layer` for every layer of a recording, all different."""
    found: list[str] = []
    for index, layer in enumerate(reader.metadata["layers"]):
        name = text(layer["name"]) or f"layer {index}"
        found.append(name if name not in found else f"{name} #{index}")
    return found


def _name_of(group: Group | None) -> str:
    """`ep:0-7`; where ranks are not consecutive, their digest: the name must not change with a run."""
    if group is None:
        return NO_GROUP
    ranks = group.ranks
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        named = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    elif len(ranks) <= 8:
        named = ",".join(map(str, ranks))
    else:
        named = hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:8]
    return text(f"{group.name}:{named}")
