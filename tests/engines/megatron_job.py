"""One rank of a Megatron job: each case trained bare, then with probes. Run by test_megatron_training.py.

Arguments: rank, ranks, folder of the rendezvous and the results, cases as `recompute:dispatcher`,
or `recompute:dispatcher:guarded` to fail where the host fetches a tensor's value.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import set_current_microbatch

import dodoco_ext
import guard
import megatron_cpu
from dodoco_ext.settings import Settings

STEPS, MICROBATCHES = 2, 2


def train(model: Any, rank: int) -> list[torch.Tensor]:
    """Losses and final gradients of two steps; two micro-batches are under way at once."""
    source = torch.Generator().manual_seed(100 + rank)
    shape = (2, megatron_cpu.SEQUENCE)
    losses = []
    for _ in range(STEPS):
        under_way = []
        for index in range(MICROBATCHES):
            set_current_microbatch(model, index)
            tokens = torch.randint(megatron_cpu.VOCABULARY, shape, generator=source)
            under_way.append(megatron_cpu.loss_of(model, tokens))
        for loss in under_way:
            loss.backward()
        losses += [loss.detach() for loss in under_way]
    return losses


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held(model: Any) -> list[tuple[str, dict[str, int]]]:
    """What every module and dispatcher holds, by identity: equal before attach() and after detach()."""
    found = []
    for name, module in model.named_modules():
        for what in (module, getattr(module, "token_dispatcher", None)):
            values = vars(what) if what is not None else {}
            found.append(
                (name, {key: id(value) for key, value in values.items() if callable(value)})
            )
            found.append((name, dict.fromkeys(values, 0)))
    return found


def run(case: str, rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    recompute, dispatcher, *guarded = case.split(":")
    settings = {"recompute": recompute, "moe_token_dispatcher_type": dispatcher}
    bare = megatron_cpu.build(expert_parallel=ranks, **settings)
    maps: list[list[torch.Tensor]] = [[], []]
    for index, layer in enumerate(bare.decoder.layers):

        def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
            if torch._C._current_graph_task_id() == -1:
                maps[index].append(output[1].clone())

        layer.mlp.router.register_forward_hook(keep)
    bare_losses = train(bare, rank)

    model = megatron_cpu.build(expert_parallel=ranks, **settings)
    set_current_microbatch(model, 0)
    with torch.no_grad():  # makes attributes that dispatchers get with their first pass
        megatron_cpu.loss_of(model, torch.zeros(1, megatron_cpu.SEQUENCE, dtype=torch.long))
    before = held(model)
    # A folder for each: in one folder, only the last two recordings of a rank are kept.
    where = replace(Settings.from_environment(), directory=folder / case.replace(":", "-"))
    attachment = dodoco_ext.megatron.attach(model, labels={"case": case}, settings=where)
    with guard.no_host_sync(allow=("numpy",)) if guarded else contextlib.nullcontext():
        losses = train(model, rank)
    attachment.detach()
    return {
        "path": str(attachment.path),
        "layers": [layer.name for layer in attachment.layers],
        "uncovered": [(part.name, part.reason) for part in attachment.uncovered],
        "maps": maps,
        "losses": (bare_losses, losses),
        "gradients": (gradients(bare), gradients(model)),
        "untouched": before == held(model),
    }


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    results = {case: run(case, rank, ranks, folder) for case in sys.argv[4:]}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
