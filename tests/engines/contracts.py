"""Sources of engines, read without importing them: which classes, methods and attributes there are."""

from __future__ import annotations

import ast

import pytest


def class_in(tree: ast.Module, name: str) -> ast.ClassDef:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    pytest.fail(
        f"no class {name}: there are {[n.name for n in tree.body if isinstance(n, ast.ClassDef)]}"
    )


def line_in(tree: ast.Module, name: str) -> list[ast.ClassDef]:
    """The class and its parents in the same file."""
    line = [class_in(tree, name)]
    names = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    for parent in line:
        line += [
            class_in(tree, base.id)
            for base in parent.bases
            if isinstance(base, ast.Name) and base.id in names
        ]
    return line


def methods_of(classes: list[ast.ClassDef]) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for each in classes:
        for node in each.body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, node)
    return found


def attributes_of(classes: list[ast.ClassDef]) -> set[str]:
    """Attributes that methods set on `self`."""
    found = set()
    for node in (node for each in classes for node in ast.walk(each)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        flat = [each for t in targets for each in (t.elts if isinstance(t, ast.Tuple) else [t])]
        found |= {
            target.attr
            for target in flat
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
        }
    return found


def calls_in(function: ast.AST) -> list[str]:
    """What is called, in the order of the text."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [
        ast.unparse(node.func) for node in sorted(calls, key=lambda n: (n.lineno, n.col_offset))
    ]
