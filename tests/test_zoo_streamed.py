"""Streaming a checkpoint layer by layer: the same counts and losses, in the memory of one layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import dodoco_ext as dodoco
from dodoco_ext.errors import InputError
from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.loading import Loading
from dodoco_ext.observatory.models import quiet
from dodoco_ext.observatory.resident import Resident, Streamed
from dodoco_ext.observatory.streamed import StreamedModel
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo.species import SPECIES, build
from observatory_cases import TEXT, ByteTokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def sharded(name: str, folder: Path, **changes: Any) -> Path:
    """An untrained model of the zoo in many small files."""
    torch.manual_seed(0)
    with quiet():
        build(SPECIES[name], **changes).save_pretrained(folder, max_shard_size="300KB")
    return folder


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize(
    ("name", "padding", "first_position"),
    [("mha", 0, True), ("mamba2", 0, True), ("gdn", 5, True), ("gqa", 3, False), ("mla", 0, False)],
)
def test_streamed_and_resident_models_give_identical_results(
    name: str, padding: int, first_position: bool, tmp_path: Path
) -> None:
    folder = sharded(name, tmp_path / "model")
    assert len(list(folder.glob("*.safetensors"))) > 10
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    shape = Shape(2, 24, 3, padding=padding, first_position=first_position)
    whole, in_layers = (
        observe.run(runner, ByteTokenizer(), [str(text)], name="m", shape=shape)[0]
        for runner in (Resident(resident(folder)), Streamed(StreamedModel(folder)))
    )
    assert in_layers.conditions == whole.conditions, "counts, passes, statistics and losses"
    assert len(whole.conditions[0].layers) == 4
    counted = shape.num_tokens - (0 if first_position else shape.num_sequences)
    assert sum(whole.conditions[0].layers[0].counts) == counted * 4


def test_a_streamed_model_generates_nothing(tmp_path: Path) -> None:
    streamed = Streamed(StreamedModel(sharded("gqa", tmp_path)))
    with pytest.raises(InputError, match=r"leave out generated:builtin:prose or --streamed"):
        observe.run(
            streamed,
            ByteTokenizer(),
            ["generated:builtin:prose"],
            name="m",
            shape=Shape(2, 24, 3),
        )


def test_a_quantised_checkpoint_is_not_streamed(tmp_path: Path) -> None:
    folder = sharded("gqa", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model is quantised.*without --streamed"):
        StreamedModel(folder)


def test_no_more_than_one_layer_is_in_memory(tmp_path: Path) -> None:
    streamed = StreamedModel(sharded("gqa", tmp_path))
    rest = streamed.num_bytes()
    whole = sum(p.numel() * p.element_size() for p in resident(tmp_path).parameters())
    layer = (whole - rest) / 4
    seen = []
    outputs = streamed.run(
        [{"input_ids": torch.ones(1, 8, dtype=torch.int64)}],
        after_layer=lambda done, total: seen.append((done, total, streamed.num_bytes())),
    )
    assert [output.logits.shape for output in outputs] == [(1, 8, 512)]
    assert seen == [(n, 4, rest) for n in (1, 2, 3, 4)], "every layer is dropped after its turn"
    assert streamed.peak_bytes == pytest.approx(rest + layer, rel=0.01)


MEASURE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from dodoco_ext.observatory.streamed import StreamedModel
torch.set_num_threads(1)
def memory(line):
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[line].split()[0]) * 1024
ids = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
def streamed(folder):
    return list(StreamedModel(Path(folder)).run([ids]))
def resident(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(**ids)
run = {"streamed": streamed, "resident": resident}[sys.argv[1]]
run(sys.argv[2])  # imports, thread pools and allocators are warm
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what is in use now
before = memory("VmRSS")
run(sys.argv[3])
print(memory("VmHWM") - before)
"""


def test_the_process_grows_by_about_one_layer_of_the_whole_model(tmp_path: Path) -> None:
    small = sharded("gqa", tmp_path / "small")
    torch.manual_seed(0)
    layers = 8
    model = build(
        SPECIES["gqa"], hidden_size=192, moe_intermediate_size=192, num_hidden_layers=layers
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    with quiet():
        model.save_pretrained(tmp_path / "large", max_shard_size="10MB")
    del model

    def growth(how: str) -> int:
        command = [sys.executable, "-c", MEASURE, how, str(small), str(tmp_path / "large")]
        # malloc may keep freed blocks of up to 32 MB, in which these layers fall, and real ones do not.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    in_layers, at_once = growth("streamed"), growth("resident")
    figures = f"{in_layers / 1e6:.0f} and {at_once / 1e6:.0f} of {whole / 1e6:.0f} MB"
    print(f"growth of the process, streamed and resident: {figures}")
    assert at_once > 0.9 * whole, f"the measure misses the weights: {figures}"
    # A layer's experts are stacked from single ones: both forms, and the pages of the file that
    # they come from, exist for a moment.
    assert in_layers < 4 * whole / layers, figures


def test_attach_sees_a_streamed_model_whole(tmp_path: Path) -> None:
    streamed = StreamedModel(sharded("mamba2", tmp_path))
    with dodoco.attach(streamed.model) as attachment:
        assert [(layer.num_experts, layer.top_k) for layer in attachment.layers] == [(64, 4)] * 4
        assert attachment.uncovered == ()


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    # Rows of experts are multiples of 16 bytes, as torch's grouped product wants them.
    streamed = StreamedModel(sharded("mha", tmp_path, moe_intermediate_size=16), torch.bfloat16)
    ids = torch.arange(16).reshape(2, 8)
    (output,) = streamed.run([{"input_ids": ids}])
    assert output.logits.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = resident(tmp_path, torch.bfloat16)(input_ids=ids).logits
    assert torch.equal(output.logits, expected)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a checkpoint in safetensors"):
        StreamedModel(tmp_path)


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    folder = sharded("gqa", tmp_path)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    norm = "model.layers.2.input_layernorm.weight"
    kept = {key: file for key, file in index["weight_map"].items() if key != norm}
    index_path.write_text(json.dumps({**index, "weight_map": kept}))
    ids = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    with pytest.raises(InputError, match=r"lacks input_layernorm\.weight of layer 2"):
        list(StreamedModel(folder).run(ids))
    shard = folder / next(iter(kept.values()))
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}.*download it again"):
        StreamedModel(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype='int3' is unknown: give one of auto, float32"),
        ({"streamed": True, "device_map": "auto"}, "leave out --device-map or --streamed"),
    ],
)
def test_ways_of_loading_that_do_not_exist_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Loading(**options)
