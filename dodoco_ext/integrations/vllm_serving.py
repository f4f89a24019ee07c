"""Records a vLLM worker from the moment that its model is loaded: what is traffic, under which name.

The recorder is switched off but while `execute_model()` runs a step that the scheduler made. So profiling,
warm-up, the capture of CUDA graphs and the dummy batches of data parallelism are not counted, in whichever
way a model runner does them; captured and compiled code obeys the switch, which is on the device. Steps that
a worker makes up to warm up look like the scheduler's: all of its warm-up is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from dodoco_ext import __version__
from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations import vllm_eplb
from dodoco_ext.integrations.patch import Patch
from dodoco_ext.integrations.vllm import LoadedModelAttachment, attach_loaded
from dodoco_ext.integrations.vllm_rows import Rows, why_not
from dodoco_ext.recorder import GroupSpec
from dodoco_ext.settings import Settings

log = logging.getLogger("vllm.dodoco")

_KEY = "dodoco"


def watch(worker: Any) -> Patch:
    """Starts recording a worker's model as soon as the worker has loaded it.

    Args:
        worker: vLLM's worker of this process, without a model yet.
    """
    served: list[Serving] = []

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = patch.call(self, *args, **kwargs)
        try:
            while served:  # a worker that loads another model
                served.pop().stop()
            if (serving := serve(self.model_runner, self.vllm_config)) is not None:
                served.append(serving)
        except Exception as error:  # telemetry never takes down its host
            log.warning("dodoco: nothing is recorded: %s: %s", type(error).__name__, error)
        return result

    def warm_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        for serving in served:
            serving.traffic.is_on = False
        try:
            return warming.call(self, *args, **kwargs)
        finally:
            for serving in served:
                serving.traffic.is_on = True

    patch = Patch(worker, "load_model", load_model)
    warming = Patch(worker, "compile_or_warm_up_model", warm_up)
    return patch


@dataclass
class Traffic:
    """Whether the steps of a worker are traffic."""

    is_on: bool = True


@dataclass(frozen=True)
class Serving:
    """The recordings of a model runner, and what is patched of it.

    Attributes:
        attachment: The model's.
        drafts: The draft model's, if it routes.
        traffic: Whether steps are traffic now.
        undo: Takes everything back.
    """

    attachment: LoadedModelAttachment
    drafts: LoadedModelAttachment | None
    traffic: Traffic
    undo: contextlib.ExitStack

    def stop(self) -> None:
        """Leaves the runner as it was."""
        self.undo.close()


def serve(runner: Any, config: Any) -> Serving | None:
    """Records what a model runner's models route while they serve.

    Args:
        runner: A model runner that has loaded its models and run nothing yet.
        config: vLLM's configuration of this worker, which the cache of compiled code is named after.

    Returns:
        What records; None, and one line in the log, where nothing can.
    """
    parallel = config.parallel_config
    reason = why_not(parallel) or why_not_compiled(config)
    if reason:
        log.warning("dodoco: nothing is recorded: %s", reason)
        return None
    rows, settings = Rows.of(parallel), settings_of(config)
    name, traffic = model_name(config), Traffic()
    with contextlib.ExitStack() as undo:
        # Before the model's, whose recording is then the latest, which is what is shown.
        drafts = _attach_draft(runner, rows, name, settings)
        if drafts is not None:
            undo.callback(drafts.detach)
        try:
            attachment = attach_loaded(
                runner.get_model(),
                even_if_none=True,
                enabled=False,
                select=None if rows.are_all else rows.select,
                group=group_of(parallel),
                labels={"model_name": name},
                settings=settings,
            )
        except NothingToObserve as error:
            log.info("dodoco: nothing is recorded: %s", error)
            return None
        undo.callback(attachment.detach)
        undo.callback(_count_steps(runner, attachment, rows, traffic).undo)
        undo.callback(vllm_eplb.watch(runner.get_model(), attachment))
        if drafts is not None:
            undo.callback(_count_drafts(runner, drafts, traffic).undo)
            undo.callback(vllm_eplb.watch(runner.get_draft_model(), drafts))
        mark_compiled_code(config)
        report(attachment)
        return Serving(attachment, drafts, traffic, undo.pop_all())


def model_name(config: Any) -> str:
    """The name that the model is served under."""
    named = config.model_config.served_model_name
    return str(named[0] if isinstance(named, (list, tuple)) else named)


def settings_of(config: Any) -> Settings:
    """The settings of this rank: vLLM knows its number, and what all ranks of this server share."""
    settings = Settings.from_environment()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        # Named here, so that the draft model's recording can be named after it.
        return replace(settings, run=settings.run or time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
    # An engine of data parallelism adds its number to what the server's engines share.
    shared = re.sub(r"_dp\d+$", "", str(config.instance_id))
    run = settings.run or re.sub(r"[^A-Za-z0-9_-]", "-", f"vllm-{shared}")[:64]
    return replace(settings, run=run, rank=dist.get_rank(), world_size=dist.get_world_size())


def group_of(parallel: Any) -> GroupSpec | None:
    """The ranks that share the experts out among them; None without expert parallelism."""
    if not parallel.enable_expert_parallel:
        return None
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    ranks = tuple(int(rank) for rank in group.ranks)
    return GroupSpec(ranks, int(group.rank_in_group)) if len(ranks) > 1 else None


def why_not_compiled(config: Any) -> str:
    """Why code compiled with probes cannot be kept apart from code without; "" if it can."""
    if isinstance(config.additional_config, dict):
        return ""
    kind = type(config.additional_config).__name__
    return f"additional_config is a {kind}, so compiled code with probes cannot be told apart"


def mark_compiled_code(config: Any) -> None:
    """Makes the cache of compiled code another one than without the recorder.

    vLLM names it after its configuration, of which `additional_config` is a part, and keeps to a folder
    that it was given.
    """
    config.additional_config[_KEY] = __version__
    compilation = config.compilation_config
    if compilation.cache_dir:
        compilation.cache_dir = os.path.join(compilation.cache_dir, f"{_KEY}-{__version__}")  # noqa: PTH118


def _attach_draft(
    runner: Any, rows: Rows, name: str, settings: Settings
) -> LoadedModelAttachment | None:
    """Records a draft model apart from the model: its tokens are not those of the traffic."""
    draft = runner.get_draft_model()
    if draft is None:
        return None
    try:
        attachment = attach_loaded(
            draft,
            even_if_none=True,
            enabled=False,
            select=None if rows.are_all else rows.select,
            labels={"model_name": f"{name} (draft)"},
            settings=replace(settings, run=f"{(settings.run or '')[:58]}-draft"),
        )
    except NothingToObserve:
        return None  # most draft models have no experts
    report(attachment, " of the draft model")
    return attachment


# What runs once a step is not in the processor's caches then, so there is little of it.


def _count_steps(
    runner: Any, attachment: LoadedModelAttachment, rows: Rows, traffic: Traffic
) -> Patch:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = int(scheduler_output.total_num_scheduled_tokens)
        if tokens == 0 or not traffic.is_on or kwargs.get("dummy_run"):
            return patch.call(self, scheduler_output, *args, **kwargs)
        _begin(attachment, rows.num_valid(tokens))
        try:
            return patch.call(self, scheduler_output, *args, **kwargs)
        finally:
            _end(attachment)

    patch = Patch(runner, "execute_model", execute_model)
    return patch


def _count_drafts(runner: Any, attachment: LoadedModelAttachment, traffic: Traffic) -> Patch:
    """Draft models run while tokens are sampled. How many of their rows are padding is not known."""

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not traffic.is_on:
            return patch.call(self, *args, **kwargs)
        _begin(attachment, None)
        try:
            return patch.call(self, *args, **kwargs)
        finally:
            _end(attachment)

    patch = Patch(runner, "sample_tokens", sample_tokens)
    return patch


def _begin(attachment: LoadedModelAttachment, num_valid: int | None) -> None:
    try:
        attachment.count(num_valid)
    except Exception as error:  # telemetry never takes down its host
        _failed(attachment, error)


def _end(attachment: LoadedModelAttachment) -> None:
    try:
        attachment.enabled = False
    except Exception as error:  # telemetry never takes down its host
        _failed(attachment, error)


def _failed(attachment: LoadedModelAttachment, error: Exception) -> None:
    if not attachment.recorder.closed:
        log.error("dodoco: recording ends: %s: %s", type(error).__name__, error)
        attachment.detach()


def report(attachment: LoadedModelAttachment, of_what: str = "") -> None:
    """The one line at start: how many layers are covered, and which are not and why."""
    missing = attachment.uncovered
    covered = attachment.num_covered
    text = f"dodoco: {covered}/{covered + len(missing)} layers{of_what} covered"
    if not missing:
        log.info("%s, recording to %s", text, attachment.path)
        return
    shown = "; ".join(f"{part.name}: {part.reason}" for part in missing[:3])
    more = f"; and {len(missing) - 3} more" if len(missing) > 3 else ""
    log.warning("%s, recording to %s; not: %s%s", text, attachment.path, shown, more)
