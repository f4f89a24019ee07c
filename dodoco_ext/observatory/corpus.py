"""Real text that every Python installation carries: English prose and Python code, split for training and holding out.

Prose is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library; code is the
standard library's source with those docstrings cut out. A document is held out by its name (a topic, or a top-level
module with everything below it), so prose and code of one module fall on the same side, and paragraphs that the
held-out side also contains are removed from training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

BUILTIN_NAMES = ("prose", "code")
"""Names that ``builtin:NAME`` accepts."""

HELD_OUT_SHARE = 5
"""One document in this many is held out of training."""

# Generated tables, other people's vendored code, and what distributions leave out or cut differently.
_EXCLUDED = frozenset(
    {
        "__phello__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
_MIN_DOCUMENT_CHARS = 400
_MAX_CODE_CHARS = 24_000  # of one module, so that no single one fills the corpus
_TRAIN_CHARS = 1_500_000
_HELD_OUT_CHARS = 600_000
_WITH_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_Docstringed = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: What it is, e.g. ``topic:assignment`` or ``code:json/decoder.py``; never a machine path.
        text: Its content.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named set of documents, split by name.

    Attributes:
        name: ``prose`` or ``code``.
        train: Documents to learn from, in name order.
        held_out: Documents that training never sees, in name order.
    """

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @cached_property
    def sha256(self) -> str:
        """Digest over names and texts of both sides."""
        return sha256_of(d.name + "\0" + d.text for d in (*self.train, *self.held_out))


def sha256_of(parts: Iterable[str]) -> str:
    """Hexadecimal SHA-256 over the parts, each followed by a byte that UTF-8 text cannot contain."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "replace"))
        digest.update(b"\xff")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def builtin_corpora() -> dict[str, Corpus]:
    """The built-in corpora by name, read from the running Python's standard library.

    Deterministic for one Python version; another version has other texts, hence other digests.
    """
    prose: list[Document] = list(_topics())
    code: list[Document] = []
    for relative, source in _stdlib_sources():
        docstrings, rest = split_docstrings(source)
        prose.append(Document(f"docstrings:{relative}", prose_of("\n\n".join(docstrings))))
        code.append(Document(f"code:{relative}", rest[:_MAX_CODE_CHARS]))
    return {
        name: split(name, documents, is_held_out)
        for name, documents in (("prose", prose), ("code", code))
    }


def num_chars(documents: Iterable[Document]) -> int:
    """Total length of the texts, in characters."""
    return sum(len(document.text) for document in documents)


def is_held_out(name: str) -> bool:
    """Whether the document called `name` is held out: decided by its topic or top-level module alone."""
    kind, _, rest = name.partition(":")
    # Docstrings and code share the key, or a module's own documentation would prepare the model for its code.
    key = f"topic:{rest}" if kind == "topic" else rest.split("/")[0].removesuffix(".py")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def split_docstrings(source: str) -> tuple[list[str], str]:
    """Separates Python source into its docstrings and everything else.

    Args:
        source: Text of a module.

    Returns:
        The docstrings in source order, and the source without the lines they stood on. A source that this Python
        cannot parse gives no docstrings and an empty rest.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return [], ""
    lines = source.splitlines()
    found: list[tuple[int, str]] = []
    for node in _definitions(tree):
        text = ast.get_docstring(node, clean=True)
        if text is None:
            continue
        statement = node.body[0]
        found.append((statement.lineno, text))
        if not isinstance(node, ast.Module) and statement.lineno == node.lineno:
            continue  # `def f(): "text"` on one line: blanking it would take the definition too
        for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[number] = "\0"
    kept = "\n".join(line.rstrip() for line in lines if line != "\0")
    return [text for _, text in sorted(found)], kept


def _definitions(tree: ast.Module) -> Iterator[_Docstringed]:
    """Everything that can carry a docstring; unlike `ast.walk`, expressions are not looked into."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _Docstringed):
            yield node
        pending += [c for c in ast.iter_child_nodes(node) if isinstance(c, _WITH_STATEMENTS)]


def prose_of(text: str) -> str:
    """Keeps the paragraphs of `text` that read as English sentences, unwrapped, with a blank line between two.

    Tables, signatures, grammar productions, examples and underlines of headings are dropped: a paragraph stays when
    it has at least eight words, ends as a sentence does, and consists of letters and spaces to at least 85 %.
    """
    kept = []
    for paragraph in text.replace("\r", "").split("\n\n"):
        words = paragraph.split()
        flat = " ".join(words)
        if len(words) < 8 or ">>>" in flat or flat[-1] not in ".:!?)":
            continue
        if sum(c.isalpha() or c == " " for c in flat) >= 0.85 * len(flat):
            kept.append(flat)
    return "\n\n".join(kept)


def _topics() -> Iterator[Document]:
    # Some distributions package pydoc's topics apart; docstrings alone are then the prose.
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return
    for name in sorted(topics):
        yield Document(f"topic:{name}", prose_of(topics[name]))


def _stdlib_sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue  # _sysconfigdata holds this machine's build paths
        yield relative.as_posix(), path.read_text("utf-8", "replace")


def split(name: str, documents: list[Document], held_out_by: Callable[[str], bool]) -> Corpus:
    """A corpus of the documents that are long enough, within a budget of characters a side.

    Args:
        name: Of the corpus.
        documents: All of them, in any order.
        held_out_by: Whether the document of a name is held out of training.
    """
    long_enough = [d for d in documents if len(d.text) >= _MIN_DOCUMENT_CHARS]
    held_out = _within(_HELD_OUT_CHARS, [d for d in long_enough if held_out_by(d.name)])
    seen = {p for d in held_out for p in d.text.split("\n\n") if len(p) >= 40}
    train = []
    for document in long_enough:
        if held_out_by(document.name):
            continue
        text = "\n\n".join(p for p in document.text.split("\n\n") if p not in seen)
        if len(text) >= _MIN_DOCUMENT_CHARS:
            train.append(Document(document.name, text))
    return Corpus(name, _within(_TRAIN_CHARS, train), held_out)


def _within(budget: int, documents: list[Document]) -> tuple[Document, ...]:
    """Documents chosen by the digest of their names until `budget` characters are reached."""
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda d: sha256_of([d.name])):
        if num_chars(chosen) >= budget:
            break
        chosen.append(document)
    return tuple(sorted(chosen, key=lambda d: d.name))
