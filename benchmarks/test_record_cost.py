"""What one record costs, beside the ways to count that torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from torch.nn import functional

from dodoco_ext import ops
from dodoco_ext.recorder import LayerSpec, Recorder

from .figures import TOLERANCE, Figures, in_us, with_interval
from .interleave import Contestant, interleave

SHAPES = ((8, 2), (64, 6), (128, 8), (256, 8), (512, 10))
NUM_TOKENS = (1, 8, 32, 128, 1024, 4096, 16384, 65536)
# A one-hot tensor of int64 beyond this many elements (32 MiB) is left out.
MAX_ONE_HOT = 1 << 22


class Routing:
    """Ids of several passes, and a layer of a recording to put them into.

    The passes take turns: a branch predictor learns one pass by heart, and no model repeats it.

    Args:
        num_tokens, num_experts, top_k: Size of a pass; the ids of a token are distinct, uniform.
    """

    def __init__(self, num_tokens: int, num_experts: int, top_k: int) -> None:
        self.recorder = Recorder([LayerSpec("router", num_experts, top_k)])
        self.site = ops.make_site(self.recorder, 0)
        self.num_experts = num_experts
        num_passes = max(2, min(64, (1 << 17) // (num_tokens * top_k)))
        rows = min(num_tokens, 4096)
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(num_passes, rows, num_experts, generator=generator)
        passes = scores.topk(top_k, dim=-1).indices.repeat(1, num_tokens // rows, 1)
        self.ids = [ids.clone() for ids in passes]
        self._ids = cycle(self.ids)
        self._ids32 = cycle([ids.to(torch.int32) for ids in self.ids])
        self._one_row = cycle([ids[:1] for ids in self.ids])

    def with_maps(self) -> None:
        """Makes the same passes as routing maps, bool and bit-packed."""
        weights = 1 << torch.arange(8)
        maps = [functional.one_hot(ids, self.num_experts).sum(dim=1).bool() for ids in self.ids]
        bits = [each.view(len(each), -1, 8).long().matmul(weights) for each in maps]
        self._maps = cycle(maps)
        self._bits = cycle([each.to(torch.uint8) for each in bits])

    def record(self) -> None:
        ops.route_ids(next(self._ids), self.site)

    def record_one_row(self) -> None:
        ops.route_ids(next(self._one_row), self.site)

    def record_int32(self) -> None:
        ops.route_ids(next(self._ids32), self.site)

    def record_map(self) -> None:
        ops.route_map(next(self._maps), self.site)

    def record_bits(self) -> None:
        ops.route_bits(next(self._bits), self.site)

    def call(self, op: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[[], None]:
        """A call of something else with the same arguments."""
        return lambda: op(next(self._ids), self.site)

    def bincount(self) -> torch.Tensor:
        return torch.bincount(next(self._ids).view(-1), minlength=self.num_experts)

    def one_hot_sum(self) -> torch.Tensor:
        return functional.one_hot(next(self._ids), self.num_experts).sum(dim=(0, 1))

    def histc(self) -> torch.Tensor:
        # histc takes no integers on the CPU.
        ids = next(self._ids).float()
        return torch.histc(ids, self.num_experts, 0, self.num_experts - 1)

    def close(self) -> None:
        self.recorder.close()
        ops.release_site(self.site.data_ptr())


@pytest.fixture
def make_routing(recordings: object) -> Iterator[Callable[[int, int, int], Routing]]:
    made: list[Routing] = []

    def make(num_tokens: int, num_experts: int, top_k: int) -> Routing:
        made.append(Routing(num_tokens, num_experts, top_k))
        return made[-1]

    yield make
    for routing in made:
        routing.close()


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_record_costs_no_more_than_bincount(
    figures: Figures, make_routing: Callable[[int, int, int], Routing], grad: bool
) -> None:
    routing = make_routing(32, 128, 8)
    with torch.set_grad_enabled(grad):
        timings = interleave(
            {"record": Contestant(routing.record), "bincount": Contestant(routing.bincount)},
            num_blocks=figures.blocks(1000),
        )
    record, bincount = timings.time("record"), timings.time("bincount")
    ratio = timings.ratio("record", "bincount")
    mode = "on" if grad else "off"
    figures.table(
        "One record of 32 x 8 int64 ids, 128 experts, through torch (CPU time)",
        ("grad mode", "record, us (p20/p50/p80)", "bincount, us", "ratio"),
    ).rows.append(
        (
            mode,
            f"{in_us(record.p20)} / {in_us(record.p50)} / {in_us(record.p80)}",
            f"{in_us(bincount.p20)} / {in_us(bincount.p50)} / {in_us(bincount.p80)}",
            with_interval(ratio),
        )
    )
    figures.add(f"record/grad {mode}/record", record)
    figures.add(f"record/grad {mode}/bincount", bincount)
    figures.judge(f"record/grad {mode}/ratio to bincount", ratio, 1.0, 1.0 + TOLERANCE)


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_cost_by_size(
    figures: Figures,
    make_routing: Callable[[int, int, int], Routing],
    num_experts: int,
    top_k: int,
) -> None:
    table = figures.table(
        "One record by size, us of CPU time (in brackets: ratio to bincount)",
        ("experts, k", "tokens", "record", "bincount", "one-hot sum", "histc"),
    )
    for num_tokens in NUM_TOKENS:
        routing = make_routing(num_tokens, num_experts, top_k)
        contestants = {
            "record": Contestant(routing.record),
            "bincount": Contestant(routing.bincount),
            "histc": Contestant(routing.histc),
        }
        if num_tokens * top_k * num_experts <= MAX_ONE_HOT:
            contestants["one_hot_sum"] = Contestant(routing.one_hot_sum)
        num_blocks = figures.blocks(60 if num_tokens <= 4096 else 20)
        timings = interleave(contestants, num_blocks=num_blocks)
        prefix = f"by size/{num_experts} experts, k {top_k}/{num_tokens} tokens"
        cost = {name: figures.add(f"{prefix}/{name}", timings.time(name)) for name in contestants}
        ratio = figures.add(f"{prefix}/ratio to bincount", timings.ratio("record", "bincount"))
        one_hot = in_us(cost["one_hot_sum"].p50) if "one_hot_sum" in cost else "-"
        table.rows.append(
            (
                f"{num_experts}, {top_k}",
                str(num_tokens),
                f"{in_us(cost['record'].p50)} ({ratio.p50:.2f})",
                in_us(cost["bincount"].p50),
                one_hot,
                in_us(cost["histc"].p50),
            )
        )
        routing.close()


def test_cost_by_form(figures: Figures, make_routing: Callable[[int, int, int], Routing]) -> None:
    table = figures.table(
        "One record by form, 128 experts, k = 8, us of CPU time",
        ("tokens", "int64 ids", "int32 ids", "bool map", "bit-packed map"),
    )
    for num_tokens in (1, 32, 1024, 16384):
        routing = make_routing(num_tokens, 128, 8)
        routing.with_maps()
        runs = {
            "int64 ids": routing.record,
            "int32 ids": routing.record_int32,
            "bool map": routing.record_map,
            "bit-packed map": routing.record_bits,
        }
        contestants = {name: Contestant(run) for name, run in runs.items()}
        timings = interleave(contestants, num_blocks=figures.blocks(60))
        cost = [
            figures.add(f"by form/{num_tokens} tokens/{name}", timings.time(name)) for name in runs
        ]
        table.rows.append((str(num_tokens), *(in_us(summary.p50) for summary in cost)))


def test_where_the_time_goes(
    figures: Figures, make_routing: Callable[[int, int, int], Routing]
) -> None:
    routing = make_routing(32, 128, 8)
    library = torch.library.Library("dodoco_benchmark", "DEF")
    library.define("empty(Tensor ids, Tensor(a!) site) -> ()")
    library.impl("empty", lambda ids, site: None, "CPU")
    library.impl("empty", torch.library.fallthrough_kernel, "Autograd")
    empty = torch.ops.dodoco_benchmark.empty.default

    def switch(enabled: bool) -> Callable[[], None]:
        return lambda: setattr(routing.recorder.lane, "enabled", enabled)

    parts = {
        "call": Contestant(routing.call(lambda ids, site: None)),
        "empty op": Contestant(routing.call(empty)),
        "disabled": Contestant(routing.record, switch(enabled=False)),
        "one row": Contestant(routing.record_one_row, switch(enabled=True)),
        "record": Contestant(routing.record, switch(enabled=True)),
    }
    timings = interleave(parts, num_blocks=figures.blocks(500))
    table = figures.table(
        "Where the time of one record goes (32 x 8 ids, 128 experts), ns of CPU time",
        ("part", "measured as", "median", "interval of the median"),
    )
    for part, how, name, base in (
        ("calling through torch", "an op that does nothing", "empty op", "call"),
        ("arguments, site, turn", "recording disabled, less that", "disabled", "empty op"),
        ("clock, statistics, publishing", "1 x 8 ids, less that", "one row", "disabled"),
        ("counting 31 more rows", "32 x 8 ids, less that", "record", "one row"),
        ("all", "32 x 8 ids", "record", "call"),
    ):
        cost = figures.add(f"parts/{part}", timings.difference(name, base))
        interval = f"{cost.low * 1e9:.0f} to {cost.high * 1e9:.0f}"
        table.rows.append((part, how, f"{cost.p50 * 1e9:.0f}", interval))
