"""The built-in corpora: what is prose, what is code, and what training may see."""

from __future__ import annotations

import ast

from dodoco_ext.observatory.corpus import (
    builtin_corpora,
    is_held_out,
    num_chars,
    prose_of,
    split_docstrings,
)

MODULE = '''"""Module text."""
import os


def f():
    """Function
    text.
    """
    return "not a docstring"


def g(): "one line"


if os:
    class C:
        """Class text."""
'''


def test_docstrings_are_separated_from_code() -> None:
    docstrings, code = split_docstrings(MODULE)
    assert docstrings == ["Module text.", "Function\ntext.", "one line", "Class text."]
    assert "text." not in code
    assert 'return "not a docstring"' in code
    assert 'def g(): "one line"' in code, "removing it would remove the definition"


def test_unparsable_source_is_left_out() -> None:
    assert split_docstrings("def f(:") == ([], "")


def test_prose_keeps_sentences_and_drops_tables_and_examples() -> None:
    sentence = "This sentence has more than eight words and\nends in a full stop."
    example = "Call it as the following example shows you here:\n>>> f(1, 2)\n3"
    grammar = 'assert_stmt ::= "assert" expression ["," expression]'
    assert prose_of(f"{sentence}\n\n{example}\n\n{grammar}\n\nTitle\n=====") == " ".join(
        sentence.split()
    )


def test_prose_and_code_of_a_module_are_held_out_together() -> None:
    names = ["json/decoder.py", "ast.py", "asyncio/tasks.py", "email/header.py", "zipapp.py"]
    for name in names:
        assert is_held_out(f"code:{name}") == is_held_out(f"docstrings:{name}")
    assert is_held_out("code:asyncio/tasks.py") == is_held_out("code:asyncio/events.py")


def test_training_never_sees_a_held_out_document_or_paragraph() -> None:
    for corpus in builtin_corpora().values():
        assert not any(is_held_out(document.name) for document in corpus.train)
        assert all(is_held_out(document.name) for document in corpus.held_out)
        held_out = {p for d in corpus.held_out for p in d.text.split("\n\n") if len(p) >= 40}
        assert not any(p in held_out for d in corpus.train for p in d.text.split("\n\n"))


def test_corpora_are_large_enough_and_reproducible() -> None:
    first = builtin_corpora()
    builtin_corpora.cache_clear()
    second = builtin_corpora()
    for name, corpus in first.items():
        assert corpus.sha256 == second[name].sha256
        assert num_chars(corpus.train) > 500_000
        # 32 passes of 8 x 128 tokens, at less than 6 characters a token
        assert num_chars(corpus.held_out) > 6 * 32_768


def test_documents_carry_no_machine_paths() -> None:
    for corpus in builtin_corpora().values():
        for document in (*corpus.train, *corpus.held_out):
            assert not document.name.partition(":")[2].startswith("/")


def test_code_without_docstrings_holds_none() -> None:
    code = builtin_corpora()["code"]
    document = min(code.held_out, key=lambda d: len(d.text))
    try:
        tree = ast.parse(document.text)
    except SyntaxError:  # a body that was nothing but its docstring
        return
    assert ast.get_docstring(tree) is None
