"""The torch ops count exactly what the reference counts, and refuse what they cannot count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import cases
from covering import Row, all_pairs, pairs_of
from dodoco_ext import _C, ops, reference
from dodoco_ext.counters import LayerSnapshot
from dodoco_ext.errors import InputError
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings

ID_ROWS, MAP_ROWS = cases.id_rows(), cases.map_rows()
Op = Callable[[torch.Tensor, torch.Tensor], object]

# The three ways to one count: the registered op, eager mode's way past the dispatcher, and the bodies
# in Python that serve other kinds of tensor, and a torch without DLPack's C interface.
IDS: dict[str, Op] = {"op": ops.route_ids, "direct": ops.direct_ids, "python": ops._route_ids}
MAPS: dict[str, Op] = {"op": ops.route_map, "direct": ops.direct_map, "python": ops._route_map}
BITS: dict[str, Op] = {"op": ops.route_bits, "direct": ops.direct_bits, "python": ops._route_bits}


class Bench:
    """One layer, its recorder, site and reader."""

    def __init__(self, num_experts: int, top_k: int = 0) -> None:
        directory = Settings.from_environment().directory
        settings = Settings(directory=directory, max_bytes=cases.SMALL_BYTES)
        self.recorder = Recorder([LayerSpec("router", num_experts, top_k)], settings=settings)
        self.site = ops.make_site(self.recorder, 0)
        self.reader = Reader(self.recorder.path)

    @property
    def layer(self) -> LayerSnapshot:
        return self.reader.snapshot().layers[0]

    @property
    def faults(self) -> tuple[int, int]:
        """Number of faults and the last one."""
        header = self.reader.header
        return header["num_faults"], header["last_fault"]

    def check(self, expected: reference.ReferencePass) -> None:
        cases.assert_layer_is(self.layer, expected)
        (record,) = self.reader.records()
        cases.assert_record_is(record, expected)
        assert self.faults == (0, int(_C.Fault.NONE))


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(num_experts: int, top_k: int = 0) -> Bench:
        made.append(Bench(num_experts, top_k))
        return made[-1]

    yield make
    for each in made:
        each.recorder.close()
        ops.release_site(each.site.data_ptr())


@pytest.mark.parametrize(
    ("factors", "possible", "rows"),
    [
        (cases.ID_FACTORS, cases._possible_ids, ID_ROWS),
        (cases.MAP_FACTORS, cases._possible_map, MAP_ROWS),
    ],
    ids=["ids", "maps"],
)
def test_every_pair_of_values_is_tried(
    factors: dict[str, tuple[object, ...]], possible: Callable[[Row], bool], rows: list[Row]
) -> None:
    tried = set().union(*(pairs_of(row, list(factors)) for row in rows))
    assert tried == set(all_pairs(factors, possible))
    assert all(possible(row) for row in rows)


@pytest.mark.parametrize("row", ID_ROWS, ids=cases.name_of)
def test_ids_are_counted_exactly(row: Row, bench: Callable[..., Bench]) -> None:
    ids, num_valid = cases.make_ids(row)
    expected = reference.route_ids(ids, row["E"], num_valid)
    for way, count in IDS.items():
        b = bench(row["E"], row["k"])
        b.recorder.lane.num_valid = -1 if num_valid is None else num_valid
        counted = count(torch.from_numpy(ids), b.site)
        assert counted is (True if way == "direct" else None)
        b.check(expected)
        layer = b.layer
        assert layer.assignments + layer.padded + layer.invalid == row["T"] * row["k"]


@pytest.mark.parametrize("row", MAP_ROWS, ids=cases.name_of)
def test_maps_are_counted_exactly(row: Row, bench: Callable[..., Bench]) -> None:
    routing_map, num_valid = cases.make_map(row)
    packed = row["form"] == "bits"
    expected = reference.route_map(routing_map, row["E"], row["k"], num_valid, packed=packed)
    for way, count in (BITS if packed else MAPS).items():
        b = bench(row["E"], row["k"])
        b.recorder.lane.num_valid = -1 if num_valid is None else num_valid
        counted = count(torch.from_numpy(routing_map), b.site)
        assert counted is (True if way == "direct" else None)
        b.check(expected)


@pytest.mark.parametrize("wrong", [60, (1 << 32) + 3, (1 << 32), -2, -(1 << 63), (1 << 63) - 1])
def test_an_id_out_of_range_is_no_expert(wrong: int, bench: Callable[..., Bench]) -> None:
    b = bench(60)
    ops.route_ids(torch.tensor([[3, wrong], [wrong, -1]]), b.site)
    assert (b.layer.invalid, b.layer.padded, b.layer.assignments) == (2, 1, 1)
    assert b.layer.counts.nonzero()[0].tolist() == [3]
    assert b.layer.tokens == 2


@pytest.mark.parametrize("num_valid", [0, 1, 5, 6])
def test_rows_beyond_num_valid_are_padding(num_valid: int, bench: Callable[..., Bench]) -> None:
    b = bench(4)
    b.recorder.lane.num_valid = num_valid
    ids = torch.tensor([[0, 1]] * 5)
    ops.route_ids(ids, b.site)
    b.check(reference.route_ids(ids.numpy(), 4, num_valid))
    assert b.layer.padded == 2 * max(5 - num_valid, 0)


@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 3, 2), 6), ((2, 2, 3, 2), 12), ((6,), 6), ((0, 3, 2), 0)]
)
def test_leading_dimensions_are_tokens(
    shape: tuple[int, ...], rows: int, bench: Callable[..., Bench]
) -> None:
    b = bench(4)
    ids = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0))
    ops.route_ids(ids, b.site)
    k = shape[-1] if len(shape) > 1 else 1
    b.check(reference.route_ids(ids.reshape(rows, k).numpy(), 4))


def test_a_map_with_leading_dimensions_is_counted(bench: Callable[..., Bench]) -> None:
    b = bench(5)
    routing_map = torch.rand(2, 3, 5) < 0.5
    ops.route_map(routing_map, b.site)
    b.check(reference.route_map(routing_map.reshape(6, 5).numpy(), 5))


def test_passes_add_up(bench: Callable[..., Bench]) -> None:
    """What one pass left in the scratch would show in the next."""
    b = bench(64, 4)
    rng = np.random.default_rng(0)
    passes = [rng.integers(-1, 66, (tokens, 4)) for tokens in (9, 100, 1, 3000, 2)]
    expected = [reference.route_ids(ids, 64) for ids in passes]
    for ids in passes:
        ops.route_ids(torch.from_numpy(ids), b.site)
    np.testing.assert_array_equal(b.layer.counts, sum(p.counts for p in expected))
    assert b.layer.passes == len(passes)
    for record, one in zip(b.reader.records(), expected, strict=True):
        cases.assert_record_is(record, one)


NOT_COUNTED = {
    "k > E": (ops.route_ids, torch.zeros(2, 5, dtype=torch.int64), "BAD_SHAPE"),
    "map too wide": (ops.route_map, torch.ones(2, 5, dtype=torch.bool), "BAD_SHAPE"),
    "map too narrow": (ops.route_map, torch.ones(2, 3, dtype=torch.bool), "BAD_SHAPE"),
    "bits too wide": (ops.route_bits, torch.ones(2, 2, dtype=torch.uint8), "BAD_SHAPE"),
    "float ids": (ops.route_ids, torch.zeros(2, 2), "UNSUPPORTED_DTYPE"),
    "uint8 ids": (ops.route_ids, torch.zeros(2, 2, dtype=torch.uint8), "UNSUPPORTED_DTYPE"),
    "bool ids": (ops.route_ids, torch.zeros(2, 2, dtype=torch.bool), "UNSUPPORTED_DTYPE"),
    "float map": (ops.route_map, torch.ones(2, 4), "UNSUPPORTED_DTYPE"),
    "int64 map": (ops.route_map, torch.ones(2, 4, dtype=torch.int64), "UNSUPPORTED_DTYPE"),
    "bool bits": (ops.route_bits, torch.ones(2, 1, dtype=torch.bool), "UNSUPPORTED_DTYPE"),
    "2^32 ids": (
        ops.route_ids,
        torch.zeros(1, 1, dtype=torch.int16).expand(1 << 32, 1),
        "TOO_LARGE",
    ),
    "sparse map": (ops.route_map, torch.ones(2, 4).bool().to_sparse(), "UNSUPPORTED_DEVICE"),
}


@pytest.mark.parametrize("case", NOT_COUNTED)
def test_what_cannot_be_counted_is_a_fault_and_turns_the_probe_off(
    case: str, bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    op, tensor, fault = NOT_COUNTED[case]
    b = bench(4)
    with caplog.at_level(logging.ERROR, "dodoco"):
        for _ in range(3):
            op(tensor, b.site)
    assert b.faults[1] == int(getattr(_C.Fault, fault))
    assert len(caplog.records) == 1
    assert fault in caplog.text
    ops.route_ids(torch.tensor([[1]]), b.site)  # the probe is off
    assert (b.layer.passes, b.layer.tokens, int(b.layer.counts.sum())) == (0, 0, 0)
    assert len(b.reader.records()) == 0


def test_a_fault_of_one_layer_leaves_the_others_alone(bench: Callable[..., Bench]) -> None:
    broken, sound = bench(4), bench(4)
    ops.route_ids(torch.zeros(1, 5, dtype=torch.int64), broken.site)
    ops.route_ids(torch.tensor([[1]]), sound.site)
    assert (broken.layer.passes, sound.layer.passes) == (0, 1)
    assert (broken.faults[0], sound.faults[0]) == (1, 0)


@pytest.mark.parametrize("way", IDS)
def test_a_refused_pass_is_one_pass(way: str, recordings: object) -> None:
    recorder = Recorder([LayerSpec("sound", 4, 1), LayerSpec("broken", 4, 1)])
    sites = [ops.make_site(recorder, layer) for layer in range(2)]
    IDS[way](torch.tensor([[1]]), sites[0])
    IDS[way](torch.zeros(1, 5, dtype=torch.int64), sites[1])
    IDS[way](torch.tensor([[1]]), sites[0])
    reader = Reader(recorder.path)
    assert reader.records()["iteration"].tolist() == [0, 1]
    assert reader.header["num_faults"] == 1
    for site in sites:
        ops.release_site(site.data_ptr())


def test_what_must_see_an_op_is_not_recorded_past_the_dispatcher(
    bench: Callable[..., Bench],
) -> None:
    b = bench(4)
    ids = torch.tensor([[1]])
    assert ops.direct_ids(ids.as_subclass(type("Other", (torch.Tensor,), {})), b.site) is False
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert ops.direct_ids(ids, b.site) is False
    assert ops.direct_ids(ids.view(1, 1, 1), b.site) is False
    assert ops.direct_ids(ids.float(), b.site) is False
    assert b.layer.passes == 0
    assert ops.direct_ids(ids, b.site) is True
    assert b.layer.passes == 1


def test_each_recording_logs_its_own_faults(caplog: pytest.LogCaptureFixture) -> None:
    """A later site may live at the address of an earlier one; its fault is news all the same."""
    addresses: set[int] = set()
    for number in range(1, 200):
        b = Bench(4)
        repeated = b.site.data_ptr() in addresses
        addresses.add(b.site.data_ptr())
        with caplog.at_level(logging.ERROR, "dodoco"):
            ops.route_ids(torch.zeros(1, 1), b.site)
        assert len(caplog.records) == number
        b.recorder.close()
        ops.release_site(b.site.data_ptr())
        if repeated:
            return
    pytest.skip("the allocator repeated no address")


def test_a_copied_site_records_nothing_and_the_original_goes_on(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(4)
    copied = b.site.clone()
    with caplog.at_level(logging.ERROR, "dodoco"):
        for _ in range(3):
            ops.route_ids(torch.tensor([[1]]), copied)
    assert b.layer.passes == 0
    assert b.faults == (3, int(_C.Fault.COPIED_SITE))
    assert len(caplog.records) == 1
    ops.route_ids(torch.tensor([[1]]), b.site)
    assert b.layer.passes == 1


def test_a_blank_site_records_nothing() -> None:
    ops.route_ids(torch.tensor([[1]]), torch.zeros(8, dtype=torch.int64))


def test_a_closed_recording_takes_no_more(bench: Callable[..., Bench]) -> None:
    b = bench(4)
    b.recorder.close()
    ops.route_ids(torch.tensor([[1]]), b.site)
    assert b.layer.passes == 0
    assert b.faults[0] == 0


def test_meta_tensors_pass_through(bench: Callable[..., Bench]) -> None:
    b = bench(4)
    ops.route_ids(torch.zeros(2, 2, dtype=torch.int64, device="meta"), b.site)
    ops.route_map(torch.zeros(2, 4, dtype=torch.bool, device="meta"), b.site)
    assert b.layer.passes == 0
    assert b.faults[0] == 0


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__
)
def test_the_ops_run_in_every_grad_mode(
    context: Callable[[], object], bench: Callable[..., Bench]
) -> None:
    b = bench(4)
    with context():  # type: ignore[attr-defined]
        ops.route_ids(torch.tensor([[1]]), b.site)
    assert b.layer.passes == 1


@pytest.mark.parametrize(("num_experts", "top_k"), [(0, 0), (4, 5), (4, -1), (65537, 1)])
def test_an_impossible_layer_is_refused(num_experts: int, top_k: int) -> None:
    with pytest.raises(InputError, match=r"'router'.*top_k=.*num_experts=.*give"):
        Recorder([LayerSpec("router", num_experts, top_k)])


def test_the_ops_declare_that_they_change_the_site_and_nothing_else() -> None:
    for op in (ops.route_ids, ops.route_map, ops.route_bits):
        tensor, site = op._schema.arguments
        assert site.alias_info is not None
        assert site.alias_info.is_write
        assert tensor.alias_info is None
        assert not op._schema.returns
