"""Which ranks of a run exchange rows with one another, as their recordings say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dodoco_ext.fleet_snapshot import Unread
from dodoco_ext.recording import Reader


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks, with the recordings that belong to it.

    Attributes:
        name: Its name, such as `ep`.
        ranks: Its global ranks, in its order.
        readers: The recordings of this very group: equal name, ranks and order.
        absent: The others of its ranks, each with its reason: `missing` and so on where there is no
            readable recording, `foreign` where it is of another group or of none. They are never
            counted in.
    """

    name: str
    ranks: tuple[int, ...]
    readers: Mapping[int, Reader]
    absent: tuple[Unread, ...]


def groups_of(readers: Mapping[int, Reader], missing: Iterable[Unread]) -> tuple[RankGroup, ...]:
    """The groups that recordings of a run name, in the order of their lowest rank.

    Args:
        readers: The recording of each rank.
        missing: Ranks of the run without one.
    """
    reasons = {part.rank: part for part in missing if part.rank is not None}
    found: dict[tuple[str, tuple[int, ...]], dict[int, Reader]] = {}
    for rank, reader in readers.items():
        group = reader.group
        if group is None:
            reasons[rank] = _foreign(rank, reader, "records no transfers")
            continue
        held = found.setdefault((group.name, group.ranks), {})
        if group.index < len(group.ranks) and group.ranks[group.index] == rank:
            held[rank] = reader
        else:
            here = f"{group.index} of the group {_named(group.name, group.ranks)}"
            reasons[rank] = _foreign(rank, reader, f"says that its place is {here}")
    for (name, ranks), held in found.items():
        for rank in held:
            reasons.setdefault(
                rank, _foreign(rank, readers[rank], f"is of the group {_named(name, ranks)}")
            )
    return tuple(
        RankGroup(
            name,
            ranks,
            held,
            tuple(
                reasons.get(rank) or Unread(rank, "missing", f"rank {rank} is not in the run")
                for rank in ranks
                if rank not in held
            ),
        )
        for (name, ranks), held in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    )


def _foreign(rank: int, reader: Reader, what: str) -> Unread:
    return Unread(rank, "foreign", f"rank {rank} {what}: {reader.path}", reader.path)


def _named(name: str, ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"{name!r} ({shown})"
