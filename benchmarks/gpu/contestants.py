"""Ways to count a pass: ours, and those that people use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch.nn import functional

from dodoco_ext import ops
from dodoco_ext.recorder import LayerSpec, Recorder

from .place import Place

BLOCK = 256
# A one-hot tensor of int64 beyond this many elements (256 MiB) is left out.
MAX_ONE_HOT = 1 << 25
ZIPF_EXPONENT = 1.0


def make_ids(
    num_tokens: int, num_experts: int, top_k: int, *, zipf: bool, device: str, seed: int = 0
) -> torch.Tensor:
    """Distinct ids [T, k] int64 a token; expert r is drawn as often as others, or as 1 / (r + 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    uniform = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    scores = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
    if zipf:
        rank = torch.arange(1, num_experts + 1, device=device)
        scores = scores - ZIPF_EXPONENT * rank.log()
    return scores.topk(top_k, dim=-1).indices.contiguous()


class Counting:
    """One shape, several passes of it in turn, and every way to count them.

    Args:
        place: Where.
        num_tokens, num_experts, top_k: Size of a pass.
        zipf: Whether few experts take most.
        recorder: A recording with one layer of this shape.
        site: The site of that layer.
    """

    def __init__(
        self,
        place: Place,
        num_tokens: int,
        num_experts: int,
        top_k: int,
        *,
        zipf: bool,
        site: torch.Tensor,
    ) -> None:
        self._place, self._site, self._num_experts = place, site, num_experts
        passes = max(2, min(8, (1 << 17) // (num_tokens * top_k)))
        options = {"zipf": zipf, "device": place.device}
        self.ids = [
            make_ids(num_tokens, num_experts, top_k, seed=seed, **options) for seed in range(passes)
        ]
        self._ids = cycle(self.ids)
        self._flat = cycle([ids.view(-1) for ids in self.ids])
        self._ones = torch.ones(num_tokens * top_k, dtype=torch.int64, device=place.device)
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=place.device)
        self._totals = torch.zeros_like(self.counts)
        self._experts = torch.arange(num_experts, device=place.device)
        self._rank = 2 * self._experts - num_experts + 1
        self._statistics = torch.zeros(3, dtype=torch.int64, device=place.device)
        self._words = torch.zeros(1, dtype=torch.int64, device=place.device)

    def ways(self) -> dict[str, Callable[[], object]]:
        """All that a graph can capture, by name."""
        ways: dict[str, Callable[[], object]] = {
            "empty node": self.nothing,
            "record": self.record,
            "histc": self.histc,
            "scatter_add chain": self.scatter_add_chain,
            "atomics": self.atomics,
        }
        if self.ids[0].numel() * self._num_experts <= MAX_ONE_HOT:
            ways["one-hot sum"] = self.one_hot_sum
        return ways

    def nothing(self) -> None:
        if self._place.dry:
            self._words.add_(0)
            return
        from .atomic_kernel import nothing

        nothing[(1,)](self._words, num_warps=1)

    def record(self) -> None:
        ops.route_ids(next(self._ids), self._site)

    def record_directly(self) -> None:
        """As a probe does in eager mode."""
        ids = next(self._ids)
        if not ops.direct_ids(ids, self._site):
            ops.route_ids(ids, self._site)

    def histc(self) -> torch.Tensor:
        flat = next(self._flat)
        ids = flat.float() if self._place.dry else flat.int()
        return torch.histc(ids, self._num_experts, 0, self._num_experts - 1)

    def one_hot_sum(self) -> torch.Tensor:
        ids = next(self._ids)
        if self._place.dry:  # one_hot looks at its argument there, which no graph can hold
            return (ids.unsqueeze(-1) == self._experts).long().sum(dim=(0, 1))
        return functional.one_hot(ids, self._num_experts).sum(dim=(0, 1))

    def scatter_add_chain(self) -> None:
        """Counts, running totals, largest count and Gini's numerator: what one record holds."""
        self.counts.zero_().scatter_add_(0, next(self._flat), self._ones)
        self._totals.add_(self.counts)
        ordered = self.counts.sort().values
        self._statistics[0].copy_((ordered * self._rank).sum())
        self._statistics[1].copy_(ordered[-1])
        self._statistics[2].copy_((ordered == 0).sum())

    def atomics(self) -> None:
        flat = next(self._flat)
        if self._place.dry:
            self.counts.scatter_add_(0, flat, self._ones)
            return
        from .atomic_kernel import count_with_atomics

        grid = (-(-flat.numel() // BLOCK),)
        count_with_atomics[grid](flat, self.counts, flat.numel(), self._num_experts, BLOCK=BLOCK)

    def bincount(self) -> torch.Tensor:
        """Waits for the device: no graph can hold it."""
        return torch.bincount(next(self._flat), minlength=self._num_experts)


class Layers:
    """Recorders of one layer each, by shape; kernels are compiled when a shape is first asked for."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._made: dict[tuple[int, int], tuple[Recorder, torch.Tensor]] = {}

    def site(self, num_experts: int, top_k: int) -> torch.Tensor:
        """The site of a layer of this shape."""
        shape = num_experts, top_k
        if shape not in self._made:
            spec = LayerSpec("router", *shape)
            recorder = Recorder([spec], devices=[self._place.device], forms=["ids"], lanes=4)
            if recorder.refused:
                raise RuntimeError(f"the recorder was refused: {recorder.refused}")
            self._made[shape] = recorder, ops.make_site(recorder, 0, self._place.device)
        return self._made[shape][1]

    def recorder(self, num_experts: int, top_k: int) -> Recorder:
        """The recorder behind `site()`."""
        self.site(num_experts, top_k)
        return self._made[num_experts, top_k][0]

    def close(self) -> None:
        """Ends the recordings."""
        for recorder, site in self._made.values():
            recorder.close()
            ops.release_site(site.data_ptr())
        self._made.clear()
