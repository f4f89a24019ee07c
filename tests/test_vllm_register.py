"""The plugin's way into a worker of vLLM, and out of the way of versions that it does not know."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from dodoco_ext.integrations import vllm_plugin, vllm_serving
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings
from dodoco_ext.sources import find
from dodoco_ext.vllm_versions import is_supported
from vllm_stubs import Runner, Runner1, WorkerWrapperBase, config, install, listening, scheduled


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def told() -> Iterator[list[str]]:
    with listening() as lines:
        yield lines


class Loads(WorkerWrapperBase):
    """A worker's process, from its start to a loaded model."""

    def __init__(self, runner: Runner) -> None:
        class Worker:
            model_runner, vllm_config = runner, config()

            def init_device(self) -> None:
                pass

            def load_model(self) -> None:
                pass

            def compile_or_warm_up_model(self) -> float:
                # As GPU workers do with their second runner: steps that say nothing of what they are.
                self.model_runner.execute_model(scheduled(100))
                self.model_runner.sample_tokens(None)
                return 1.5

        self.worker = Worker()

    def load(self) -> None:
        self.init_device()
        self.load_model()


@pytest.mark.parametrize("wanted", ["1", "0"])
def test_the_plugin_records_a_worker_where_it_is_asked_to(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerWrapperBase, "init_device", WorkerWrapperBase.init_device)
    monkeypatch.setenv("DODOCO", wanted)
    vllm_plugin.register()
    vllm_plugin.register()
    runner = Runner1()
    Loads(runner).load()
    runner.execute_model(scheduled(4))
    assert (runner.model[0].router.capture_fn is not None) is (wanted == "1")


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "unknown"])
def test_another_version_is_left_untouched_with_one_line(
    version: str, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    install(monkeypatch, version=version)
    monkeypatch.setenv("DODOCO", "1")
    before = WorkerWrapperBase.init_device
    vllm_plugin.register()
    assert WorkerWrapperBase.init_device is before
    (line,) = told
    assert line.startswith(f"dodoco: nothing is recorded: vLLM {version} is not one of those ")
    assert line.endswith("(0.32 and 0.33; 0.32.0 is tested)")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1"])
def test_builds_of_a_supported_version_are(version: str) -> None:
    assert is_supported(version)


def test_off_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dodoco_ext.integrations.vllm_plugin import register; register();"
        "print([name for name in ('torch', 'numpy', 'vllm', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_steps_that_warm_up_are_no_traffic() -> None:
    runner = Runner1(draft=True)
    loads = Loads(runner)
    vllm_serving.watch(loads.worker)
    loads.load_model()
    assert loads.compile_or_warm_up_model() == 1.5
    runner.execute_model(scheduled(3))
    runner.sample_tokens(None)
    found = [Reader(listed.path) for listed in find(Settings.from_environment().directories())]
    assert sorted(each.snapshot().layers[0].tokens for each in found) == [1, 3]


def test_a_worker_that_loads_again_is_recorded_once() -> None:
    runner = Runner1()
    loads = Loads(runner)
    vllm_serving.watch(loads.worker)
    loads.load_model()
    first = runner.model[0].router.capture_fn
    loads.load_model()
    assert runner.model[0].router.capture_fn is not first
    runner.execute_model(scheduled(3))
    found = [Reader(listed.path) for listed in find(Settings.from_environment().directories())]
    assert sorted((each.state, each.snapshot().layers[0].tokens) for each in found) == [
        ("closed", 0),
        ("live", 3),
    ]
