"""The names of vLLM that the plugin relies on. Nothing of vLLM is imported here.

Tests check every one of them against the sources of the releases of `vllm_versions`; the rest of vLLM may
change.
"""

from __future__ import annotations

from dodoco_ext.integrations.symbols import Symbol

_MOE = "model_executor/layers/fused_moe"
_RUNNER_METHODS = (
    ("load_model", ("load_dummy_weights",)),
    ("get_model", ()),
    ("get_draft_model", ()),
    ("sample_tokens", ("grammar_output",)),
)

WORKER = Symbol(
    "v1/worker/worker_base.py",
    "WorkerWrapperBase",
    (("init_worker", ("all_kwargs",)), ("init_device", ())),
    ("worker",),
)
WORKER_BASE = Symbol(
    "v1/worker/worker_base.py",
    "WorkerBase",
    (("load_model", ()), ("compile_or_warm_up_model", ())),
    ("vllm_config", "model_runner"),
)
RUNNER_1 = Symbol(
    "v1/worker/gpu_model_runner.py",
    "GPUModelRunner",
    (
        *_RUNNER_METHODS,
        ("execute_model", ("scheduler_output", "intermediate_tensors")),
        ("_dummy_run", ("num_tokens",)),
    ),
)
RUNNER_2 = Symbol(
    "v1/worker/gpu/model_runner.py",
    "GPUModelRunner",
    (
        *_RUNNER_METHODS,
        ("execute_model", ("scheduler_output", "intermediate_tensors", "dummy_run")),
        ("_dummy_run", ("num_tokens",)),
    ),
)
ROUTER = Symbol(
    f"{_MOE}/router/base_router.py",
    "BaseRouter",
    (("set_capture_fn", ("capture_fn",)),),
    ("capture_fn", "top_k"),
)
LAYER = Symbol(
    f"{_MOE}/runner/moe_runner.py",
    "MoERunner",
    (("is_monolithic", ()),),
    ("router", "routed_experts", "moe_config"),
)
DATA_PARALLEL = Symbol("forward_context.py", "DPMetadata", (), ("local_sizes",))

SYMBOLS = (WORKER, WORKER_BASE, RUNNER_1, RUNNER_2, ROUTER, LAYER, DATA_PARALLEL)

PARALLEL_FIELDS = (
    "data_parallel_size",
    "data_parallel_rank",
    "tensor_parallel_size",
    "prefill_context_parallel_size",
    "enable_expert_parallel",
    "enable_dbo",
)
"""Fields of `ParallelConfig` that are read; `use_sequence_parallel_moe` is a property of it."""
