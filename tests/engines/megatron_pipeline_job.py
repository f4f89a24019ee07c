"""One rank of a pipeline of two stages under Megatron's own schedule; the first stage has no MoE layer.

Arguments: rank, ranks, folder, virtual pipeline stages on each rank (1 or 2).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent)]
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import dodoco_ext
import megatron_cpu

MICROBATCHES, STEPS, BATCH = 4, 2, 2


class Writer:
    """TensorBoard's writer, as far as it is used."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> Any:
    tokens = next(batches)
    ids, positions, mask = megatron_cpu.inputs(tokens)
    output = model(ids, positions, mask, labels=tokens)
    return output, partial(lambda tokens, output: (output.mean(), {}), tokens)


def main() -> None:
    rank, ranks, folder, chunks = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]),
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    settings: dict[str, Any] = {
        "num_layers": 4,
        "pipeline_model_parallel_size": ranks,
        "pipeline_dtype": torch.float32,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "moe_layer_freq": [0, 0, 1, 1] if chunks == 1 else [0, 1, 1, 1],
        "mtp_num_layers": 1 if chunks == 1 else None,
    }
    model = [
        megatron_cpu.build(vp_stage=stage if chunks > 1 else None, **settings)
        for stage in range(chunks)
    ]
    attachment = dodoco_ext.megatron.attach(model if chunks > 1 else model[0])
    source = torch.Generator().manual_seed(7)
    shape = (BATCH, megatron_cpu.SEQUENCE)
    writer = Writer()
    run = get_forward_backward_func()
    for step in range(STEPS):
        batches = [
            torch.randint(megatron_cpu.VOCABULARY, shape, generator=source)
            for _ in range(MICROBATCHES)
        ]
        iterators = [iter(batches) for _ in range(chunks)]
        run(
            forward_step_func=forward_step,
            data_iterator=iterators if chunks > 1 else iterators[0],
            model=model if chunks > 1 else model[0],
            num_microbatches=MICROBATCHES,
            seq_length=megatron_cpu.SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        attachment.log(None, step)
        for chunk in model:
            chunk.zero_grad()
    local = attachment.log(None, STEPS)  # nothing since the last one
    with torch.no_grad():
        snapshot = attachment.snapshot()
    group = _logged(attachment, writer, run, model, chunks)
    attachment.detach()
    torch.save(
        {
            "path": str(attachment.path),
            "layers": [layer.name for layer in attachment.layers],
            "uncovered": [(part.name, part.reason) for part in attachment.uncovered],
            "counts": [layer.counts for layer in snapshot.layers],
            "empty": local,
            "group": group,
            "scalars": writer.scalars,
        },
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def _logged(attachment: Any, writer: Writer, run: Any, model: Any, chunks: int) -> dict[str, float]:
    """One more step, written with a reduction over all ranks; only the last has a writer."""
    batches = [torch.zeros(BATCH, megatron_cpu.SEQUENCE, dtype=torch.long)] * MICROBATCHES
    iterators = [iter(batches) for _ in range(chunks)]
    run(
        forward_step_func=forward_step,
        data_iterator=iterators if chunks > 1 else iterators[0],
        model=model if chunks > 1 else model[0],
        num_microbatches=MICROBATCHES,
        seq_length=megatron_cpu.SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=True,
    )
    last = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, float] = attachment.log(
        writer if last else None, 9, reduce="group", per_layer=True
    )
    return found


if __name__ == "__main__":
    main()
