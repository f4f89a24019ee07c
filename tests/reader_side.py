"""Prints the test files that need no torch: `pytest $(python tests/reader_side.py)`.

A file needs torch if it, or a helper beside it that it imports, names torch, what is built on it, or
a part of the package that a model is recorded with. What the package's other parts import does not
count: should one of them come to need torch, its tests fail where there is none.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEED_TORCH = (
    *("torch", "transformers", "triton"),
    "dodoco_ext.attachment",
    "dodoco_ext.integrations",
    "dodoco_ext.observatory",
    "dodoco_ext.ops",
    "dodoco_ext.triton_kernels",
)

# How the package is built, and the writer under faults: tried with one interpreter.
APART = {"test_build.py", "test_containers.py", "test_forks.py", "test_full.py", "test_kill.py"}


def imported(file: Path) -> set[str]:
    """Full names of what a file imports, functions included, or is skipped without."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        match node:
            case ast.Expr(
                ast.Call(ast.Attribute(attr="importorskip"), [ast.Constant(str(name)), *_])
            ):
                names.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def needs_torch(file: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether a test or helper, or a helper that it imports, needs torch."""
    for name in imported(file):
        if any(name == each or name.startswith(each + ".") for each in NEED_TORCH):
            return True
        helper = HERE / f"{name.split('.')[0]}.py"
        if helper.exists() and helper not in seen and needs_torch(helper, seen | {file}):
            return True
    return False


def test_files() -> list[Path]:
    """The test files that need no torch."""
    files = [file for file in sorted(HERE.glob("test_*.py")) if file.name not in APART]
    return [file for file in files if not needs_torch(file)]


if __name__ == "__main__":
    chosen = test_files()
    left_out = (
        {file.name for file in HERE.glob("test_*.py")} - {file.name for file in chosen} - APART
    )
    print("left out, as they need torch:", *sorted(left_out), file=sys.stderr)
    print(*(file.relative_to(HERE.parent) for file in chosen))
