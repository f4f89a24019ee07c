"""Trains a small mixture-of-experts GPT with Megatron-Core, with DODOCO attached in one line.

    torchrun --nproc-per-node 2 docs/examples/megatron_moe.py --steps 100

The experts are spread over all ranks. Scalars go to `runs/` every ten steps, and every rank records its
routing and its AlltoAlls (`dodoco show` lists the recordings).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.tensorboard import SummaryWriter

import dodoco_ext

VOCABULARY, LENGTH, BATCH, MICROBATCHES = 256, 64, 4, 2


def build(device: torch.device) -> GPTModel:
    """A GPT of 4.6 million parameters, a fifth of which work on a token."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_moe_experts=16,
        moe_router_topk=2,
        moe_ffn_hidden_size=256,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    return GPTModel(config, spec, VOCABULARY, LENGTH).to(device)


def batches(device: torch.device) -> Iterator[torch.Tensor]:
    """Sequences that go up by a step of their own, [BATCH, LENGTH + 1]."""
    source = torch.Generator().manual_seed(dist.get_rank())
    while True:
        start, step = torch.randint(1, VOCABULARY, (2, BATCH, 1), generator=source)
        yield ((start + step * torch.arange(LENGTH + 1)) % VOCABULARY).to(device)


def forward_step(data: Iterator[torch.Tensor], model: GPTModel) -> Any:
    """What Megatron's schedules call for each micro-batch."""
    text = next(data)
    positions = torch.arange(LENGTH, device=text.device).expand(BATCH, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=text.device).triu(1)
    losses = model(text[:, :-1], positions, mask, labels=text[:, 1:])
    return losses, partial(lambda output: (output.mean(), {"loss": output.mean().detach()}))


def average_gradients(model: GPTModel) -> None:
    """What Megatron's DDP does; experts are whole on their rank, and see the tokens of all."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            if getattr(parameter, "allreduce", True):
                dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log-interval", type=int, default=10)
    parser.add_argument("--tensorboard", default="runs")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    if on_gpu:
        model_parallel_cuda_manual_seed(0)
    model = build(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    writer = SummaryWriter(options.tensorboard) if dist.get_rank() == 0 else None

    attachment = dodoco_ext.megatron.attach(model)  # the one line

    run, data, started = get_forward_backward_func(), batches(device), time.monotonic()
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        average_gradients(model)
        optimizer.step()
        if step % options.log_interval == 0:
            attachment.log(writer, step)  # this rank's shard; reduce="group" for all ranks
            if writer is not None:
                writer.add_scalar("loss", losses[-1]["loss"].item(), step)
    if writer is not None:
        seconds = time.monotonic() - started
        print(f"{options.steps / seconds:.1f} steps/s, last loss {losses[-1]['loss'].item():.2f}")
        print(f"recorded in {attachment.path}")
        writer.close()
    attachment.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
