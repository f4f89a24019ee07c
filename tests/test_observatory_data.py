"""Texts from files, JSONL, data sets and the installation, with errors that say what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.data import load_data


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_text_files(tmp_path: Path, suffix: str) -> None:
    text = load_data(write(tmp_path / f"a{suffix}", "words"))
    assert (text.name, text.documents) == (f"a{suffix}", ("words",))


def test_jsonl_with_text_and_with_messages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "  "},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_data(path).documents == ("one", "hi\n\nho")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.txt", " \n\t\n", "holds no text"),
        ("empty.jsonl", "", "holds no text"),
        ("broken.jsonl", "{", "line 1 is not JSON"),
        ("other.jsonl", '{"body": "x"}', "neither the field 'text' nor 'messages'"),
        ("list.jsonl", "[1]", "neither the field 'text' nor 'messages'"),
        ("table.csv", "a,b", "unknown suffix '.csv'"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    refuses(write(tmp_path / name, content), message)


def test_unreadable_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    refuses(str(path), "as UTF-8 text")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/missing.txt", "no such data"),
        ("builtin:poetry", "no built-in text 'poetry'"),
        ("hf:", "is not a data set"),
        ("hf:a,b,c,d", "is not a data set"),
    ],
)
def test_unknown_sources(source: str, message: str) -> None:
    refuses(source, message)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    refuses(str(tmp_path), "is a folder")


@pytest.mark.parametrize("name", ["prose", "code"])
def test_builtin_texts(name: str) -> None:
    assert load_data(f"builtin:{name}").documents


def test_a_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("hf:somebody/something", "pip install datasets")


def test_a_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    refuses("hf:somebody/something", r"cannot load 'hf:somebody/something' \(no route\)")


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [("hf:n", None, "train"), ("hf:n,test", None, "test"), ("hf:n,small,test", "small", "test")],
)
def test_a_data_set(
    monkeypatch: pytest.MonkeyPatch, source: str, config: str | None, split: str
) -> None:
    asked: list[Any] = []

    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return iter([{"text": "first"}, {"text": "second"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_data(source).documents == ("first", "second")
    assert asked == [("n", config, split, True)]


def refuses(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


def test_turns_of_one_role_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    said = [("user", "a question"), ("assistant", "an answer"), ("assistant", "and more")]
    messages = [{"role": role, "content": content} for role, content in said]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert load_data(f"turns:assistant:{path}").documents == ("an answer\n\nand more",)
    assert load_data(f"turns:user:{path}").documents == ("a question",)
    assert load_data(f"turns:user:{path}").name == "user turns of chat.jsonl"
    with pytest.raises(InputError, match="holds no text"):
        load_data(f"turns:system:{path}")


def test_turns_of_what_has_none_are_refused(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("words")
    rows.write_text('{"text": "words"}\n')
    with pytest.raises(InputError, match="has no messages"):
        load_data(f"turns:assistant:{plain}")
    with pytest.raises(InputError, match="lacks the field 'messages'"):
        load_data(f"turns:assistant:{rows}")
