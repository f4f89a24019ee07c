"""The plugin of vLLM against stand-ins for its runners: what counts as traffic, and how often a token does.

The real server on the CPU is in tests/engines/test_vllm_server.py. Runners of GPUs, ranks that share tokens
and draft models are seen here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dodoco_ext.integrations import vllm_serving
from dodoco_ext.integrations.vllm_rows import why_not
from dodoco_ext.integrations.vllm_serving import Serving, serve
from dodoco_ext.settings import Settings
from vllm_stubs import (
    TOP_K,
    Group,
    Runner,
    Runner1,
    Runner2,
    config,
    install,
    listening,
    parallel,
    scheduled,
)

BOTH = pytest.mark.parametrize("kind", [Runner1, Runner2])


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def told() -> Iterator[list[str]]:
    with listening() as lines:
        yield lines


def served(runner: Runner, **changes: Any) -> Serving:
    serving = serve(runner, config(**changes))
    assert serving is not None
    return serving


def tokens(serving: Serving) -> list[int]:
    return [layer.tokens for layer in serving.attachment.snapshot().layers]


@BOTH
def test_steps_of_the_scheduler_count_and_dummy_runs_do_not(kind: type[Runner]) -> None:
    runner = kind()
    serving = served(runner)
    runner._dummy_run(100)  # type: ignore[attr-defined]
    assert runner.execute_model(scheduled(7)) == "executed"  # type: ignore[attr-defined]
    runner._dummy_run(100)  # type: ignore[attr-defined]
    runner.execute_model(scheduled(0))  # type: ignore[attr-defined]
    runner.forward(50)
    runner.execute_model(scheduled(3), intermediate_tensors=None)  # type: ignore[attr-defined]
    assert tokens(serving) == [10, 10]
    serving.stop()


@BOTH
def test_padding_of_a_graph_is_not_traffic(kind: type[Runner]) -> None:
    runner = kind(padded=16)
    serving = served(runner)
    runner.execute_model(scheduled(5))  # type: ignore[attr-defined]
    (first, _) = serving.attachment.snapshot().layers
    assert (first.tokens, first.padded) == (5, 11 * TOP_K)
    assert int(first.counts.sum()) == 5 * TOP_K
    serving.stop()


def test_a_step_that_fails_raises_its_own_error_and_what_follows_is_not_counted() -> None:
    runner = Runner1()
    serving = served(runner)
    with pytest.raises(AttributeError, match="total_num_scheduled_tokens"):
        runner.execute_model(SimpleNamespace())
    broken, runner.model = runner.model, None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        runner.execute_model(scheduled(5))
    runner.model = broken
    runner.forward(9)
    assert tokens(serving) == [0, 0]
    runner.execute_model(scheduled(5))
    assert tokens(serving) == [5, 5]
    serving.stop()


def test_stopped_the_runner_is_as_it_was() -> None:
    runner = Runner2(draft=True)
    before = dict(vars(runner))
    serving = served(runner)
    assert vars(runner) != before
    serving.stop()
    serving.stop()
    assert vars(runner) == before
    assert all(layer.router.capture_fn is None for layer in runner.model)
    assert runner.execute_model(scheduled(5)) == "executed"


@BOTH
def test_a_draft_model_is_recorded_apart(kind: type[Runner]) -> None:
    runner = kind(draft=True)
    serving = served(runner)
    assert serving.drafts is not None
    runner._dummy_run(4)  # type: ignore[attr-defined]
    runner.execute_model(scheduled(5))  # type: ignore[attr-defined]
    assert runner.sample_tokens(None) == "sampled"
    assert tokens(serving) == [5, 5]
    assert [layer.tokens for layer in serving.drafts.snapshot().layers] == [1]
    labels = [one.reader.metadata["labels"] for one in (serving.attachment, serving.drafts)]
    assert labels == [{"model_name": "tiny"}, {"model_name": "tiny (draft)"}]
    runs = [one.reader.metadata["run"] for one in (serving.attachment, serving.drafts)]
    assert runs[1] == f"{runs[0]}-draft"
    created = [one.reader.header["created_unix_ns"] for one in (serving.attachment, serving.drafts)]
    assert created[1] < created[0]
    serving.stop()


def test_a_server_with_expert_parallelism_names_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, groups={"ep": Group([4, 5, 6], 1)}, sizes=[2, 2, 2])
    runner = Runner2()
    serving = served(
        runner, enable_expert_parallel=True, data_parallel_size=3, data_parallel_rank=1
    )
    runner.execute_model(scheduled(2))
    group = serving.attachment.reader.group
    assert group is not None
    assert (group.name, group.ranks, group.index) == ("ep", (4, 5, 6), 1)
    assert tokens(serving) == [2, 2]
    serving.stop()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_sequence_parallel_moe": True}, "shard"),
    ],
)
def test_what_cannot_be_counted_exactly_is_refused_in_one_line(
    changes: dict[str, Any], reason: str, told: list[str]
) -> None:
    runner = Runner1()
    assert reason in why_not(parallel(**changes))
    assert serve(runner, config(**changes)) is None
    (line,) = told
    assert line.startswith("dodoco: nothing is recorded: ")
    assert "execute_model" not in vars(runner)


def test_compiled_code_is_kept_apart_by_vllms_own_key() -> None:
    made, runner = config(), Runner1()
    made.compilation_config.cache_dir = "/cache"
    serving = serve(runner, made)
    assert serving is not None
    assert list(made.additional_config) == ["dodoco"]
    assert made.compilation_config.cache_dir.startswith("/cache/dodoco-")
    serving.stop()


def test_without_such_a_key_nothing_is_recorded(told: list[str]) -> None:
    made, runner = config(), Runner1()
    made.additional_config = object()
    assert serve(runner, made) is None
    assert "additional_config is a object" in told[0]


def test_a_model_of_which_no_layer_can_be_observed_leaves_a_recording_that_says_so(
    told: list[str],
) -> None:
    runner = Runner1(layers=1)
    runner.model[0].is_monolithic = True
    serving = served(runner)
    runner.execute_model(scheduled(5))
    reader = serving.attachment.reader
    assert [part["name"] for part in reader.metadata["uncovered"]] == ["0"]
    assert reader.metadata["layers"][0]["routed"] is False
    assert told[0].startswith("dodoco: 0/1 layers covered, recording to ")
    serving.stop()


def test_a_model_without_experts_is_left_alone(told: list[str]) -> None:
    runner = Runner1(layers=0)
    assert serve(runner, config()) is None
    assert "it has none" in told[0]
    assert "execute_model" not in vars(runner)


def test_the_layers_that_are_not_covered_are_named_with_the_reason(told: list[str]) -> None:
    runner = Runner1(layers=5)
    for layer in list(runner.model)[1:]:
        layer.is_monolithic = True
    served(runner).stop()
    kernel = "the kernel of its SimpleNamespace chooses the experts itself"
    assert told[0].startswith("dodoco: 1/5 layers covered, recording to ")
    assert told[0].endswith(f"; not: 1: {kernel}; 2: {kernel}; 3: {kernel}; and 1 more")


def test_what_fails_of_ours_leaves_the_runner_as_it_was(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(vllm_serving, "mark_compiled_code", fails)
    runner, worker = Runner1(), SimpleNamespace()

    class Worker:
        model_runner, vllm_config = runner, config()

        def load_model(self) -> str:
            return "loaded"

        def compile_or_warm_up_model(self) -> str:
            return "warm"

    worker = Worker()
    patch = vllm_serving.watch(worker)
    assert worker.load_model() == "loaded"
    assert worker.compile_or_warm_up_model() == "warm"
    assert told == ["dodoco: nothing is recorded: RuntimeError: planted"]
    assert "execute_model" not in vars(runner)
    assert all(layer.router.capture_fn is None for layer in runner.model)
    patch.undo()


def test_a_setting_that_is_refused_ends_recording_and_not_the_step(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner1()
    serving = served(runner)

    def refuses(*_: object) -> None:
        raise RuntimeError("the current stream is being captured")

    monkeypatch.setattr(serving.attachment.recorder, "set", refuses)
    for _ in range(3):
        assert runner.execute_model(scheduled(5)) == "executed"
    assert sum("recording ends" in line for line in told) == 1
    assert serving.attachment.recorder.closed
    serving.stop()


def test_ranks_of_one_server_share_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 4, get_rank=lambda: 3
    )
    monkeypatch.setattr(vllm_serving, "dist", dist)
    found = vllm_serving.settings_of(config())
    assert (found.run, found.rank, found.world_size) == ("vllm-abcde", 3, 4)
    monkeypatch.setenv("DODOCO_RUN", "mine")
    assert vllm_serving.settings_of(config()) == replace(
        Settings.from_environment(), run="mine", rank=3, world_size=4
    )
