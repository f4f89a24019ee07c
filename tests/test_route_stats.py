"""Statistics of a pass are exact integers, and fall into the bins that exact fractions name."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cases
from dodoco_ext import reference
from dodoco_ext.counters import MAX_OVER_MEAN_BOUNDS, Snapshot

MOST_EXPERTS = 40
# The same function picks a method by the largest count: a histogram of counts below 4 E, else a sort.
FLAT = st.integers(1, MOST_EXPERTS).flatmap(
    lambda E: st.lists(st.integers(0, 4 * E - 1), min_size=E, max_size=E)
)
STEEP = st.integers(1, MOST_EXPERTS).flatmap(
    lambda E: st.tuples(
        st.lists(st.integers(0, 400), min_size=E, max_size=E),
        st.integers(0, E - 1),
        st.integers(4 * E, 20000),
    ).map(lambda drawn: [drawn[2] if e == drawn[1] else c for e, c in enumerate(drawn[0])])
)
given_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def probe() -> Iterator[cases.Probe]:
    """Layer E - 1 has E experts."""
    opened = cases.Probe.open(*[(E, 0) for E in range(1, MOST_EXPERTS + 1)], max_bytes=4 << 20)
    yield opened
    opened.recorder.close()


def record_counts(probe: cases.Probe, counts: list[int], extra_rows: int = 0) -> np.void:
    """Records one pass whose counts are given; returns its record."""
    ids = np.repeat(np.arange(len(counts)), counts).reshape(-1, 1)
    ids = np.concatenate([ids, np.full((extra_rows, 1), -1)])
    cursor = probe.reader.cursor()
    assert probe.record_ids(ids, layer=len(counts) - 1) == 0
    (record,), _, lost = probe.reader.read(cursor)
    assert lost == 0
    return record


def expected_bins(record: np.void, num_experts: int) -> tuple[int, int, int]:
    """(size class, Gini bin, max/mean bin) by exact arithmetic on a record's values."""
    tokens, total = int(record["tokens"]), int(record["assignments"])
    gini = Fraction(int(record["gini_numerator"]), num_experts * total)
    max_over_mean = Fraction(num_experts * int(record["max_count"]), total)
    size = max(c for c in range(20) if 2**c <= max(tokens, 1))
    gini_bin = max(b for b in range(32) if Fraction(b, 32) <= gini)
    bounds = [Fraction(bound) for bound in MAX_OVER_MEAN_BOUNDS]
    return size, gini_bin, max(b for b, bound in enumerate(bounds) if bound <= max_over_mean)


def check_statistics(probe: cases.Probe, counts: list[int]) -> None:
    E = len(counts)
    before = probe.snapshot()
    record = record_counts(probe, counts)
    assert int(record["gini_numerator"]) == sum(abs(a - b) for a, b in combinations(counts, 2))
    assert int(record["max_count"]) == max(counts)
    assert int(record["unused_experts"]) == counts.count(0)
    assert int(record["assignments"]) == sum(counts)
    check_bins(probe, before, record, E)


def check_bins(probe: cases.Probe, before: Snapshot, record: np.void, E: int) -> None:
    """The histograms gained this pass, in the right bin, and nothing else."""
    window = (probe.snapshot() - before).layers[E - 1]
    gini, max_over_mean = window.gini_histogram, window.max_over_mean_histogram
    assert gini.shape == max_over_mean.shape == (20, 32)
    if record["assignments"] == 0:
        assert int(gini.sum()) == int(max_over_mean.sum()) == 0
        return
    size, gini_bin, max_bin = expected_bins(record, E)
    assert list(zip(*gini.nonzero(), strict=True)) == [(size, gini_bin)]
    assert list(zip(*max_over_mean.nonzero(), strict=True)) == [(size, max_bin)]
    assert int(gini.sum()) == int(max_over_mean.sum()) == 1


@given_settings
@given(FLAT)
@example([0])
@example([1])
@example([3, 3, 3, 3])
@example([0, 0, 7])
@example([159] + [0] * 39)
def test_flat_counts(probe: cases.Probe, counts: list[int]) -> None:
    check_statistics(probe, counts)


@given_settings
@given(STEEP)
@example([4])
@example([8, 0])
@example([160] + [0] * 39)
def test_steep_counts(probe: cases.Probe, counts: list[int]) -> None:
    check_statistics(probe, counts)


@pytest.mark.parametrize("largest", [4 * 512 - 1, 4 * 512, 4 * 512 + 1])
def test_both_methods_agree_where_one_takes_over(largest: int) -> None:
    rng = np.random.default_rng(largest)
    counts = rng.integers(0, largest, 512)
    counts[100] = largest
    probe = cases.Probe.open((512, 0))
    ids = np.repeat(np.arange(512), counts).reshape(-1, 1)
    probe.record_ids(ids)
    cases.assert_record_is(probe.reader.records()[0], reference.route_ids(ids, 512))
    probe.recorder.close()


@pytest.mark.parametrize(
    "counts",
    [
        [1] * 32,  # Gini 0, max/mean 1
        [5, 3],  # Gini 1/8 exactly: the lower bound of bin 4
        [9, 7],  # 1/16
        [17, 15],  # 1/32
        [33, 31],  # just below 1/32
        [9] + [7] * 7 + [8] * 8,  # max/mean 9/8
        [10, 6],  # 10/8
        [99] + [1] * 31,  # far out
        [1] + [0] * 39,  # the largest max/mean that 40 experts have
    ],
    ids=str,
)
def test_a_value_on_a_bound_belongs_to_the_bin_above(probe: cases.Probe, counts: list[int]) -> None:
    check_statistics(probe, counts)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 1023, 1024, (1 << 19) - 1, 1 << 19, 1 << 20])
def test_size_classes_are_powers_of_two_and_the_last_is_open(tokens: int) -> None:
    probe = cases.Probe.open((4, 1))
    before = probe.snapshot()
    same = np.lib.stride_tricks.as_strided(np.array([[2]], np.int16), (tokens, 1), (0, 2))
    probe.record_ids(same)
    check_row = (probe.snapshot() - before).layers[0].gini_histogram.nonzero()[0].tolist()
    assert check_row == [min(tokens.bit_length() - 1, 19)]
    probe.recorder.close()


def test_padding_rows_do_not_raise_the_size_class(probe: cases.Probe) -> None:
    before = probe.snapshot()
    record = record_counts(probe, [2, 1], extra_rows=100)
    assert (int(record["tokens"]), int(record["padded"])) == (3, 100)
    check_bins(probe, before, record, 2)


def test_the_largest_max_over_mean_reaches_the_last_bin() -> None:
    """1024 experts and one token: 1024, the bound of the last bin but some; never beyond."""
    probe = cases.Probe.open((1024, 1))
    before = probe.snapshot()
    probe.record_ids(np.array([[1023]]))
    (record,) = probe.reader.records()
    window = (probe.snapshot() - before).layers[0]
    size, gini_bin, max_bin = expected_bins(record, 1024)
    assert window.max_over_mean_histogram[size, max_bin] == 1
    assert window.gini_histogram[size, gini_bin] == 1
    assert gini_bin == 31
    probe.recorder.close()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_the_reference_is_the_definition(counts: list[int]) -> None:
    assert reference.gini_numerator(counts) == sum(abs(a - b) for a, b in combinations(counts, 2))


def test_the_reference_by_hand() -> None:
    """Every counter of three small passes, worked out on paper."""
    ids = reference.route_ids(
        np.array([[0, 2], [-1, 2], [-1, -1], [5, -7], [1, 1]]), 3, num_valid=4
    )
    assert ids.counts.tolist() == [1, 0, 2]
    assert (ids.tokens, ids.assignments, ids.padded, ids.invalid) == (3, 3, 5, 2)
    assert (ids.max_count, ids.unused_experts, ids.gini_numerator) == (2, 1, 4)
    dense = reference.route_map(np.array([[1, 1, 0], [0, 9, 0], [1, 1, 1]]), 3, 2, num_valid=2)
    assert dense.counts.tolist() == [1, 2, 0]
    assert (dense.tokens, dense.padded, dense.capacity_dropped, dense.invalid) == (2, 2, 1, 0)
    packed = np.array([[0b0000_0101], [0b1000_0010]], np.uint8)
    bits = reference.route_map(packed, 3, 2, packed=True)
    assert bits.counts.tolist() == [1, 1, 1]
    assert (bits.tokens, bits.capacity_dropped, bits.invalid) == (2, 1, 1)
