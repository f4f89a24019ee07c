"""The OpenAI-compatible server of vLLM with the plugin: what is counted is what was asked for, exactly."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from dodoco_ext import cli
from dodoco_ext.counters import Snapshot
from dodoco_ext.recording import Reader
from shown import show_json
from vllm_models import LAYERS, SHAPES, TOP_K, build
from vllm_server import NAME, Server, add_plugin, passed, serving, site_of
from vllm_sources import vllm_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = ["The quick brown fox", [1, 2, 3, 4, 5, 6, 7], "a" * 100, "To be, or not to be: " * 8]
LABELS = {"model_name": NAME, "ep_group": "none", "rank": "0"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def eager(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("eager")
    options = ("--enforce-eager", "--enable-prompt-tokens-details")
    with serving(checkpoint, folder, *options) as server:
        yield server


def assert_counted(
    before: Snapshot | None, after: Snapshot, tokens: int, layers: int = LAYERS
) -> None:
    """That every layer saw so many tokens more, none of them padding, and sent each to k experts."""
    window = after if before is None else after - before
    assert [layer.tokens for layer in window.layers] == [tokens] * layers
    assert [int(layer.counts.sum()) for layer in window.layers] == [tokens * TOP_K] * layers
    assert [layer.padded + layer.invalid for layer in after.layers] == [0] * layers


def texts(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["choices"][0]["text"] for answer in answers]


def test_a_server_says_what_it_covers_and_counts_no_warm_up(eager: Server) -> None:
    (line,) = eager.lines
    (path,) = eager.recordings
    assert line == f"{LAYERS}/{LAYERS} layers covered, recording to {path}"
    assert_counted(None, eager.snapshot(), 0)
    assert eager.reader.metadata["labels"] == {"model_name": NAME}


def test_completions_and_chats_are_counted_exactly(eager: Server) -> None:
    before = eager.snapshot()
    answers = [eager.complete(prompt, max_tokens=5 + i) for i, prompt in enumerate(PROMPTS)]
    chat = [{"role": "user", "content": "How are you?"}]
    answers.append(eager.post("/v1/chat/completions", messages=chat, max_tokens=9, ignore_eos=True))
    assert_counted(before, eager.settled(), sum(passed(answer, cached=True) for answer in answers))


def test_what_is_cached_of_a_prompt_is_not_routed_again(eager: Server) -> None:
    prompt = list(range(10, 200))
    counted = []
    for _ in range(2):
        before = eager.settled()
        answer = eager.complete(prompt, max_tokens=4)
        after = eager.settled()
        assert_counted(before, after, passed(answer, cached=True))
        counted.append(passed(answer, cached=True))
    assert counted[1] < counted[0] - 100, "the second time most of it was cached"


def test_requests_at_the_same_time_are_counted_exactly(eager: Server) -> None:
    before, answers = eager.settled(), []

    def ask(seed: int) -> None:
        answers.append(eager.complete([seed + n for n in range(20 + seed)], max_tokens=10 + seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert_counted(before, eager.settled(), sum(passed(answer, cached=True) for answer in answers))


def test_the_exporter_and_show_say_what_the_recording_says(
    eager: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    monkeypatch.setenv("DODOCO_DIR", str(eager.folder))
    recorded = eager.settled()
    assert cli.run(["metrics", "--once"]) == 0
    families = text_string_to_metric_families(capsys.readouterr().out)
    samples = [sample for family in families for sample in family.samples]
    tokens = {
        s.labels["layer"]: s.value
        for s in samples
        if s.name == "dodoco_tokens_total" and s.labels.items() >= LABELS.items()
    }
    assert tokens == {layer.name: layer.tokens for layer in recorded.layers}
    assert min(tokens.values()) > 0
    shown = show_json(capsys, eager.recordings[0])
    assert [layer["tokens"] for layer in shown["layers"]] == list(tokens.values())


def test_a_server_killed_under_load_leaves_a_recording_that_show_reads(
    eager: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last of those that use this server."""
    before = eager.settled()
    answers: list[int] = []

    def load(seed: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                answers.append(passed(eager.complete([seed, len(answers), seed], max_tokens=20)))

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(answers) < 8 and time.monotonic() < until:
        time.sleep(0.05)
    done = sum(answers)
    reader = eager.reader
    assert reader.state == "live"
    eager.kill()
    for thread in threads:
        thread.join()
    eager.process.wait(30)
    until = time.monotonic() + 30
    while reader.state == "live" and time.monotonic() < until:
        time.sleep(0.05)  # the worker is another process than the one that was waited for
    assert done > 0
    assert reader.state == "dead"
    last = reader.snapshot()
    for old, layer in zip(before.layers, last.layers, strict=True):
        assert layer.tokens - old.tokens >= done
        flagged = layer.in_flight
        assert flagged or int(layer.counts.sum()) == layer.tokens * TOP_K
    shown = show_json(capsys, eager.recordings[0])
    assert shown["recording"]["state"] == "dead"
    assert [x["tokens"] for x in shown["layers"]] == [x.tokens for x in last.layers]
    monkeypatch.setenv("DODOCO_DIR", str(eager.folder))
    assert cli.run(["metrics", "--once"]) == 0
    up = [s for s in capsys.readouterr().out.splitlines() if s.startswith("dodoco_recorder_up{")]
    assert [line.rpartition(" ")[2] for line in up] == ["0.0"]


@pytest.mark.parametrize("turns", ["101", "01"])
def test_compiled_code_with_the_plugin_and_without_is_kept_apart(
    turns: str, checkpoint: Path, tmp_path: Path
) -> None:
    """A cold cache, and ones left by a run with the plugin, by one without it, and by both."""
    cache, said = tmp_path / "cache", []
    for turn, plugin in enumerate(turns):
        folder = tmp_path / str(turn)
        with serving(
            checkpoint,
            folder,
            "--no-enable-prefix-caching",
            cache=cache,
            environ={"DODOCO": plugin},
        ) as server:
            answers = [server.complete(prompt, max_tokens=12) for prompt in PROMPTS]
            said.append(texts(answers))
            if plugin == "1":
                answers += [server.complete(prompt, max_tokens=2) for prompt in PROMPTS]
                assert_counted(None, server.settled(), sum(map(passed, answers)))
            else:
                assert server.recordings == []
                assert server.lines == []
    assert said == said[:1] * len(turns), "greedy answers are the same, token by token"
    kept = list((cache / "torch_compile_cache" / "torch_aot_compile").iterdir())
    assert len(kept) == 2, "one with the plugin, one without"


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("deepseek_v2", 1), ("gpt_oss", 1)])
def test_other_families_are_counted_exactly(name: str, ranks: int, tmp_path: Path) -> None:
    """Started by `dodoco run`, which is all that it takes; one of them on two tensor-parallel ranks."""
    model = build(name, tmp_path / "model")
    with serving(
        model,
        tmp_path,
        *("--enforce-eager", "--no-enable-prefix-caching", "--tensor-parallel-size", str(ranks)),
        environ={"DODOCO": None, "VLLM_PLUGINS": "lora_filesystem_resolver"},
        launch=[vllm_python(), "-m", "dodoco_ext", "run", "--run", "mine", "--"],
    ) as server:
        answers = [server.complete(prompt) for prompt in PROMPTS[:3]]
        server.settled_all()
        readers = [Reader(path) for path in server.recordings]
        assert [reader.header["rank"] for reader in readers] == list(range(ranks))
        assert all(reader.path.name.startswith("mine.") for reader in readers)
        seen = [reader.snapshot().layers for reader in readers]
        assert all(len(layers) == SHAPES[name].moe_layers for layers in seen)
        for layer in zip(*seen, strict=True):
            assert sum(part.tokens for part in layer) == sum(map(passed, answers))
            assert all(int(part.counts.sum()) == part.tokens * TOP_K for part in layer)
            assert all(part.tokens for part in layer), "each rank counts its share"
    covered = [line for line in server.lines if f"{LAYERS}/{LAYERS} layers covered" in line]
    assert len(covered) == ranks


def test_a_kernel_that_routes_by_itself_is_reported_and_not_shown_as_zeros(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_plugin(site_of(tmp_path), Path(__file__).with_name("vllm_monolithic.py"))
    with serving(checkpoint, tmp_path, "--enforce-eager", "--no-enable-prefix-caching") as server:
        answer = server.complete(PROMPTS[0])
        (line,) = server.lines
        reason = "model.layers.1.mlp.experts: the kernel of its MonolithicMethod chooses the experts itself"
        assert line.startswith(f"{LAYERS - 1}/{LAYERS} layers covered, recording to ")
        assert line.endswith(f"; not: {reason}")
        assert_counted(None, server.settled(), passed(answer), LAYERS - 1)
        uncovered = server.reader.metadata["uncovered"]
        assert [f"{part['name']}: {part['reason']}" for part in uncovered] == [reason]
        monkeypatch.setenv("DODOCO_DIR", str(server.folder))
        assert cli.run(["metrics", "--once"]) == 0
        exported = capsys.readouterr().out
        assert 'rank="0",state="uncovered"} 1.0' in exported
        assert 'rank="0",state="covered"} 2.0' in exported
        cli.run(["doctor", "--json"])
        checks = json.loads(capsys.readouterr().out)["checks"]
        (found,) = [check for check in checks if "not observed" in check["value"]]
        assert found["status"] == "warning"
        assert reason in found["value"]
