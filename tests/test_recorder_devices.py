"""Recorders and attachments with layers on devices, where no device can be had."""

from __future__ import annotations

import logging

import pytest
import torch

import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.integrations import places
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.views.summary import FAULTS
from toy import ToyModel, assert_recorded, some_tokens

LAYERS = [LayerSpec("gate", 8, 2)]
TOKENS = some_tokens()


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this machine has one."""

    def refuse(device: int) -> int:
        raise OSError(f"no device {device} here")

    monkeypatch.setattr(_C, "device_capability", refuse)


def placed(monkeypatch: pytest.MonkeyPatch, model: ToyModel, devices: list[str]) -> ToyModel:
    """A model on the CPU whose layers say that they are elsewhere."""
    found = dict(zip((layer.experts for layer in model.layers), devices, strict=True))
    monkeypatch.setattr(places, "device_of", lambda module: torch.device(found[module]))
    return model


@pytest.mark.parametrize(
    ("devices", "lanes", "names"),
    [
        (["cpu"], None, ["host"]),
        (["cpu"], 3, ["host", "host 1", "host 2"]),
        (["cuda:0"], None, ["cuda:0", "cuda:0 1"]),
        (["cuda:1", "cpu", "cuda:0"], 1, ["host", "cuda:0", "cuda:0 1", "cuda:1", "cuda:1 1"]),
        (["cuda:10", "cuda:9"], 3, [f"cuda:{d}{n}" for d in (9, 10) for n in ("", " 1", " 2")]),
        ([f"cuda:{d}" for d in range(16)], None, [f"cuda:{d}" for d in range(16)]),
    ],
)
def test_a_lane_for_each_thread_and_two_or_more_a_device(
    devices: list[str], lanes: int | None, names: list[str]
) -> None:
    recorder = Recorder(LAYERS, devices=devices, lanes=lanes)
    reader = Reader(recorder.path)
    assert reader.metadata["lanes"] == names
    assert reader.header["num_lanes"] == len(names)
    assert len(recorder.lanes) == sum(name.startswith("host") for name in names)
    recorder.close()


@pytest.mark.parametrize(
    ("devices", "lanes", "message"),
    [
        ([], None, r"devices=\(\): name at least one"),
        (["xpu:0"], None, "device 'xpu:0': give 'cpu' or 'cuda:N'"),
        (["cuda"], None, "device 'cuda': give"),
        (["cuda:0"], 17, "lanes=17: give 1 to 16"),
        (["cpu", "cuda:0"], 9, "lanes=9: give 1 to 8 with 2 devices"),
        ([f"cuda:{d}" for d in range(17)], None, "17 lanes .* 16 are possible"),
    ],
)
def test_impossible_devices_and_lanes_are_refused(
    devices: list[str], lanes: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Recorder(LAYERS, devices=devices, lanes=lanes)


def test_a_device_that_cannot_be_set_up_is_a_fault_in_the_recording(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "dodoco"):
        recorder = Recorder(LAYERS, devices=["cuda:0", "cuda:1"])
    assert recorder.refused == {
        "cuda:0": "OSError: no device 0 here",
        "cuda:1": "OSError: no device 1 here",
    }
    assert not recorder.devices
    assert "nothing on cuda:1 is recorded: OSError: no device 1 here" in caplog.text
    header = Reader(recorder.path).header
    assert (header["num_faults"], header["last_fault"]) == (2, int(_C.Fault.NO_DEVICE))
    assert "nothing on it is recorded" in FAULTS["NO_DEVICE"]
    recorder.close()
    assert Reader(recorder.path).state == "closed"


def test_settings_can_be_read_and_set_without_any_lane_that_records() -> None:
    recorder = Recorder(LAYERS, devices=["cuda:0"])
    recorder.set("enabled", 0)
    recorder.set("num_valid", 3)
    assert recorder.get("num_valid") == -1, "nobody listens"
    recorder.close()


def test_layers_on_a_refused_device_are_uncovered_and_the_others_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = placed(monkeypatch, ToyModel(num_layers=3), ["cpu", "cuda:0", "cpu"])
    bare = model(TOKENS)
    with dodoco.attach(model) as a:
        assert torch.equal(model(TOKENS), bare)
        assert [part.name for part in a.uncovered] == ["layers.1.experts"]
        assert "no device 0 here" in a.uncovered[0].reason
        assert [layer.passes for layer in a.snapshot().layers] == [1, 0, 1]
        assert a.reader.header["last_fault"] == int(_C.Fault.NO_DEVICE)
        assert a.reader.metadata["backend"] == "cpu+cuda"
    assert_recorded_nothing_left(model)


def test_a_model_on_a_refused_device_runs_as_without_the_recorder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = placed(monkeypatch, ToyModel(num_layers=2), ["cuda:0", "cuda:0"])
    bare = model(TOKENS)
    a = dodoco.attach(model)
    assert torch.equal(model(TOKENS), bare)
    a.enabled = False
    assert len(a.uncovered) == 2
    a.detach()
    assert a.reader.state == "closed"
    assert_recorded_nothing_left(model)


def assert_recorded_nothing_left(model: ToyModel) -> None:
    for layer in model.layers:
        assert "_dodoco_site" not in layer.experts.__dict__
        assert not layer.experts._forward_pre_hooks


@pytest.mark.parametrize("place", ["xpu:0", "mps"])
def test_other_devices_are_uncovered(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model = placed(monkeypatch, ToyModel(num_layers=2), [place, "cpu"])
    with dodoco.attach(model) as a:
        assert "records on CPUs and NVIDIA GPUs" in a.uncovered[0].reason
        assert [part["name"] for part in a.reader.metadata["uncovered"]] == ["layers.0.experts"]
    model = placed(monkeypatch, ToyModel(num_layers=1), [place])
    with pytest.raises(NothingToObserve, match="records on CPUs and NVIDIA GPUs"):
        dodoco.attach(model)


def test_amd_gpus_and_layers_too_wide_are_uncovered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = placed(monkeypatch, ToyModel(num_layers=2), ["cuda:0", "cpu"])
    monkeypatch.setattr(places, "MAX_EXPERTS", 4)
    with dodoco.attach(model) as a:
        assert "and on a GPU 4 can be counted" in a.uncovered[0].reason
        model(TOKENS)
        assert a.reader.header["num_faults"] == 0
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with dodoco.attach(model) as a:
        assert "an AMD GPU" in a.uncovered[0].reason


def test_the_cpu_keeps_its_lane_when_nothing_is_on_a_device() -> None:
    model = ToyModel(num_layers=2)
    with dodoco.attach(model) as a:
        model(TOKENS)
        assert_recorded(a, model, [TOKENS])
        assert a.reader.metadata["lanes"] == ["host"]
        assert a.reader.metadata["backend"] == "cpu"
