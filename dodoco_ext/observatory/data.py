"""Text for real conditions: files, JSONL, `datasets` names, texts of packages and the built-in corpora."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.corpus import BUILTIN_NAMES, builtin_corpora, sha256_of
from dodoco_ext.observatory.packaged import SOURCES, packaged_corpus

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py"})
_MAX_CHARS = 32_000_000


@dataclass(frozen=True)
class Text:
    """Documents of one source.

    Attributes:
        name: How reports call it: the source without folders.
        documents: Non-empty texts; no sequence of a condition mixes two without a separator.
        description: One phrase on what it is.
    """

    name: str
    documents: tuple[str, ...]
    description: str

    @property
    def sha256(self) -> str:
        """Digest of the documents."""
        return sha256_of(self.documents)


def load_data(source: str) -> Text:
    """Reads the text that SOURCE means.

    Args:
        source: `builtin:prose`, `builtin:code`, `packaged:NAME`, `hf:NAME[,CONFIG][,SPLIT]`, a
            `.jsonl` file (field `text`, or `messages` with `content`), a text file, or
            `turns:ROLE:SOURCE`, of the latter only the messages of one role. At most the first 32
            million characters are used.

    Raises:
        InputError: There is no such text, it is empty, or it cannot be read.
    """
    kind, _, rest = source.partition(":")
    if kind == "builtin":
        return _builtin(source, rest)
    if kind == "packaged":
        return _packaged(source, rest)
    if kind == "turns":
        return _turns(source, rest)
    return _rows(source)


def _rows(source: str, role: str | None = None) -> Text:
    """Text of a file or of a data set, of one role's messages where `role` says so."""
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return _dataset(source, rest, role)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder: give one of its files as --data")
    if not path.is_file():
        raise InputError(
            f"no such data: {source!r}; give a .txt, .md, .py or .jsonl file, hf:NAME, "
            "builtin:prose, builtin:code, packaged:english, packaged:bulgarian, packaged:dialogue, "
            "turns:ROLE:SOURCE, mock-uniform, mock-unigram, mock-repeat, shuffled:SOURCE or "
            "generated:SOURCE"
        )
    if path.suffix != ".jsonl" and path.suffix not in TEXT_SUFFIXES:
        raise InputError(
            f"{source} has the unknown suffix {path.suffix!r}: give .txt, .md, .rst, .py or .jsonl"
        )
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source} as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        documents = _checked(source, _jsonl(source, text, role))
        return Text(path.name, documents, "text of a JSONL file")
    if role is not None:
        raise InputError(
            f"{source} has no messages: give a .jsonl file or hf:NAME after turns:ROLE:"
        )
    return Text(path.name, _checked(source, [text]), "text of a file")


def check_file(source: str) -> None:
    """Reads a file that SOURCE names, to find what is wrong with it before a model is loaded.

    Raises:
        InputError: As `load_data()`. Sources that are no file are left for later.
    """
    text = source
    for prefix in ("shuffled:", "mock-unigram:", "generated:"):
        text = text.removeprefix(prefix)
    file = text.split(":", 2)[2] if text.startswith("turns:") and text.count(":") > 1 else text
    if text and not file.startswith(("mock-", "builtin:", "packaged:", "hf:")):
        load_data(text)


def _builtin(source: str, name: str) -> Text:
    if name not in BUILTIN_NAMES:
        raise InputError(
            f"no built-in text {name!r} in {source!r}: give builtin:prose or builtin:code"
        )
    documents = builtin_corpora()[name].held_out
    what = "documentation" if name == "prose" else "source code"
    description = f"{what} of the Python standard library, the part held out from the demo model"
    return Text(source, tuple(document.text for document in documents), description)


def _packaged(source: str, name: str) -> Text:
    if name not in SOURCES:
        choices = ", ".join(f"packaged:{known}" for known in SOURCES)
        raise InputError(f"no packaged text {name!r} in {source!r}: give {choices}")
    documents = packaged_corpus(name).held_out
    description = f"{SOURCES[name].description}, the part held out from the zoo"
    return Text(source, tuple(document.text for document in documents), description)


def _turns(source: str, rest: str) -> Text:
    role, _, inner = rest.partition(":")
    if not role or not inner:
        raise InputError(
            f"{source!r} is incomplete: write turns:ROLE:SOURCE, as turns:assistant:a.jsonl"
        )
    text = _rows(inner, role)
    return Text(f"{role} turns of {text.name}", text.documents, f"messages of the role {role!r}")


def _dataset(source: str, rest: str, role: str | None = None) -> Text:
    name, *options = rest.split(",")
    if not name or len(options) > 2:
        raise InputError(
            f"{source!r} is not a data set: write hf:NAME, hf:NAME,SPLIT or hf:NAME,CONFIG,SPLIT"
        )
    split = options[-1] if options else "train"
    config = options[0] if len(options) == 2 else None
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source!r} needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        documents = _checked(source, (_text_of(source, row, role) for row in rows))
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many packages, its own and the network's
        raise InputError(
            f"cannot load {source!r} ({first_line(error)}): check the name, config and split, or be online"
        ) from None
    return Text(source, documents, "a data set of the hub")


def _jsonl(source: str, text: str, role: str | None) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{source}, line {number} is not JSON: {error.msg}") from None
        yield _text_of(f"{source}, line {number}", row, role)


def _text_of(where: str, row: object, role: str | None) -> str:
    if isinstance(row, Mapping):
        if role is None and isinstance(row.get("text"), str):
            return str(row["text"])
        messages = row.get("messages")
        if isinstance(messages, list):
            return "\n\n".join(_content(m) for m in messages if role in (None, _role(m)))
    if role is not None:
        raise InputError(
            f"{where} lacks the field 'messages': turns of a role cannot be told apart"
        )
    raise InputError(f"{where} has neither the field 'text' nor 'messages': rename the field")


def _content(message: Any) -> str:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, str) else ""


def _role(message: Any) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _checked(source: str, documents: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    budget = _MAX_CHARS
    for text in documents:
        if budget <= 0:
            break
        if text.strip():
            kept.append(text[:budget])
            budget -= len(kept[-1])
    if not kept:
        raise InputError(f"{source} holds no text: give a source that is not empty")
    return tuple(kept)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, shortened to `limit` characters."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."
