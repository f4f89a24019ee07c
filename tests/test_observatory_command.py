"""`dodoco observe` from end to end on a model of a few steps, and its errors of one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dodoco_ext.errors import DodocoError, InputError, NothingToObserve
from dodoco_ext.observatory.command import observe
from dodoco_ext.observatory.corpus import Corpus, Document
from dodoco_ext.observatory.models import quiet
from dodoco_ext.observatory.tokenizer import train_tokenizer
from dodoco_ext.observatory.zoo.species import SPECIES, build

pytest.importorskip("transformers")

SMALL = ["--batch-size", "2", "--sequence-length", "16", "--num-batches", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of fresh weights, with its tokenizer."""
    folder = tmp_path_factory.mktemp("command") / "model"
    documents = tuple(Document(f"d:{n}", "some words of text\n" * 60) for n in range(2))
    model = build(SPECIES["gqa"], num_hidden_layers=2, num_experts=8, num_experts_per_tok=2)
    with quiet():
        model.save_pretrained(folder)
        train_tokenizer({"text": Corpus("text", documents, ())}, 320).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("the words of a text that is long enough\n" * 60)
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(observe, list(arguments))


def fails(expected: type[DodocoError], *arguments: str) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, expected), result.output
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_observe_a_saved_model(folder: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(
        "--model", str(folder), "--data", "mock-uniform", "--data", text, "--out", str(out), *SMALL
    )
    assert result.exit_code == 0, result.output
    assert "uniform mock / words.txt" in result.output
    for name in ("report.html", "report.png", "results.json"):
        assert (out / name).stat().st_size > 0
    written = (out / "results.json").read_text() + (out / "report.html").read_text()
    assert str(tmp_path) not in written, "no machine paths in what is passed on"


def test_json_on_stdout(folder: Path, text: str, tmp_path: Path) -> None:
    result = invoke(
        "--model", str(folder), "--data", text, "--out", str(tmp_path / "o"), "--json", *SMALL
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["conditions"][0]["num_tokens"] == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["--model", "x"], "no data given"),
        (["--preset", "demo", "--model", "x"], "leave out --model and --data"),
        (["--preset", "demo", "--num-batches", "1"], "--num-batches"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_streamed_model_gives_the_same_report(folder: Path, text: str, tmp_path: Path) -> None:
    common = ["--model", str(folder), "--data", text, "--json", *SMALL]
    whole = invoke(*common, "--out", str(tmp_path / "a"))
    streamed = invoke(*common, "--out", str(tmp_path / "b"), "--streamed")
    assert streamed.exit_code == 0, streamed.output
    found = [json.loads(result.stdout) for result in (whole, streamed)]
    assert found[0]["conditions"] == found[1]["conditions"]
    facts = [data["provenance"] for data in found]
    assert [f["loading"] for f in facts] == ["whole", "layer by layer"]
    assert [f["placement"] for f in facts] == ["cpu", "cpu, meta"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for fact in facts:
        assert fact["weights sha256"] == digest
        assert len(fact["tokenizer sha256"]) == 64
        assert (fact["dtype"], fact["attention backend"]) == ("float32", "sdpa")
        assert fact["chat template"] == "none applied"
        assert fact["lost records"] == "0"


def test_padding_and_bos_are_in_the_result(folder: Path, text: str, tmp_path: Path) -> None:
    common = ["--model", str(folder), "--data", text, "--out", str(tmp_path), "--json", *SMALL]
    result = invoke(*common, "--padding", "4")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["padding"], data["bos"]) == (4, False)
    assert data["conditions"][0]["num_tokens"] == 96, "padding is counted: equal tokens a cell"
    assert "leave out --bos" in fails(InputError, *common, "--bos")


def test_a_model_that_the_zoo_does_not_have(tmp_path: Path) -> None:
    message = fails(
        InputError, "--model", "zoo:moa", "--data", "mock-uniform", "--out", str(tmp_path)
    )
    assert message == "no model 'moa' in the zoo: give one of mla, mha, gqa, mamba2, gdn"


def test_missing_model_folder(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    message = fails(
        InputError, "--model", missing, "--data", "mock-uniform", "--out", str(tmp_path)
    )
    assert message.startswith(f"no such model folder: {missing}")


def test_folder_without_a_model(tmp_path: Path) -> None:
    message = fails(
        InputError, "--model", str(tmp_path), "--data", "mock-uniform", "--out", str(tmp_path)
    )
    assert "holds no config.json" in message


def test_missing_file_and_empty_text(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    common = ["--model", str(folder), "--out", str(tmp_path), *SMALL]
    assert "no such data" in fails(InputError, *common, "--data", str(tmp_path / "missing.txt"))
    assert "holds no text" in fails(InputError, *common, "--data", str(empty))


@pytest.mark.parametrize("kind", ["", "shuffled:", "mock-unigram:"])
def test_files_are_looked_at_before_the_model_is_loaded(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str, loading: object) -> None:
        raise AssertionError(f"{source} was loaded before the data was looked at")

    monkeypatch.setattr("dodoco_ext.observatory.models.load_model", load)
    missing = f"{kind}{tmp_path / 'missing.txt'}"
    message = fails(InputError, "--model", str(folder), "--out", str(tmp_path), "--data", missing)
    assert "no such data" in message


def test_vocabulary_mismatch(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "small")
    message = fails(
        InputError,
        *("--model", str(tmp_path / "small"), "--data", "mock-uniform", "--out", str(tmp_path)),
    )
    assert "vocabulary mismatch" in message
    assert "the model embeds 100" in message


def test_dense_model(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "dense")
    message = fails(
        NothingToObserve,
        *("--model", str(tmp_path / "dense"), "--data", "mock-uniform", "--out", str(tmp_path)),
    )
    assert "no MoE router in Qwen3ForCausalLM" in message


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    message = fails(
        InputError, "--model", "x/y", "--data", "mock-uniform", "--out", str(blocker / "out")
    )
    assert "give another --out" in message


def test_unknown_model_id_offline(tmp_path: Path) -> None:
    code = (
        "from dodoco_ext.observatory.models import load_model\n"
        "from dodoco_ext.errors import InputError\n"
        "try: load_model('nobody/no-such-model')\n"
        "except InputError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout
    assert lines[0].startswith("cannot load the model 'nobody/no-such-model'")
    assert "give a local folder" in lines[0]


def test_help_shows_every_kind_of_source_and_examples() -> None:
    output = invoke("--help").output
    for word in (
        *("mock-uniform", "mock-unigram", "shuffled:SOURCE", "hf:NAME", "builtin:prose"),
        *("generated:SOURCE", "turns:ROLE:SOURCE", "packaged:bulgarian", "grid", "zoo:gqa"),
    ):
        assert word in output
    assert "dodoco observe --preset demo" in output
