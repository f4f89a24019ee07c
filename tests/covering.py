"""A greedy pairwise covering array: every allowed pair of values occurs in at least one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(row: Mapping[str, Any], names: Sequence[str]) -> set[Pair]:
    """All pairs of (factor, value) of a row, factors in the order of `names`."""
    return set(combinations([(name, row[name]) for name in names if name in row], 2))


def all_pairs(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]
) -> dict[Pair, None]:
    """Every pair that may occur, in a fixed order."""
    return {
        ((a, x), (b, y)): None
        for a, b in combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if allowed({a: x, b: y})
    }


def covering_array(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Rows that cover every allowed pair of values.

    Args:
        factors: Values of each factor.
        allowed: Judges a partial row; False means that no completion of it may be used.

    Raises:
        ValueError: A pair is allowed by itself and in no whole row.
    """
    names = list(factors)
    pending = all_pairs(factors, allowed)
    rows = []
    while pending:
        row: Row = dict(next(iter(pending)))
        # Factors with many values first: they have the most pairs to cover.
        for name in sorted(set(names) - set(row), key=lambda name: (-len(factors[name]), name)):
            choices = [value for value in factors[name] if allowed({**row, name: value})]
            if not choices:
                raise ValueError(f"no {name} fits {row}")
            # Ties by turns, so that no value is favoured.
            turn = len(rows) % len(choices)
            row[name] = max(
                choices[turn:] + choices[:turn],
                key=lambda value: sum(
                    pair in pending for pair in pairs_of({**row, name: value}, names)
                ),
            )
        for pair in pairs_of(row, names):
            pending.pop(pair, None)
        rows.append({name: row[name] for name in names})
    return rows
