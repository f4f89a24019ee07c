"""What is shipped: contents of wheel and sdist, imports from elsewhere, no machine paths."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import reader_side

ROOT = Path(__file__).resolve().parent.parent
# Folders of sources in the checkout -> where a wheel has them.
PACKAGE_DIRS = {"dodoco_ext": "dodoco_ext", "triton_kernels": "dodoco_ext/triton_kernels"}
BUILT = {".venv", "build", "dist", "results", ".git", "__pycache__"}
CACHES = {".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", ".benchmarks"}


def checkout_files() -> list[Path]:
    """Every source file of the checkout, relative to its root (by walking it if git is absent)."""
    if (ROOT / ".git").exists():
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [Path(name) for name in names.split("\0") if name and (ROOT / name).is_file()]
    return [
        path.relative_to(ROOT)
        for path in ROOT.rglob("*")
        if path.is_file() and not (BUILT | CACHES) & set(path.relative_to(ROOT).parts)
    ]


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """Paths of the installed distribution, as its wheel's RECORD lists them."""
    return {str(path) for path in importlib.metadata.distribution("dodoco-ext").files or ()}


def test_the_wheel_has_every_file_of_the_package(installed: set[str]) -> None:
    sources = [path for path in checkout_files() if path.parts[0] in PACKAGE_DIRS]
    expected = {
        str(Path(PACKAGE_DIRS[path.parts[0]], *path.parts[1:]))
        for path in sources
        if path.suffix != ".so"
    }
    assert expected - installed == set()
    assert {"dodoco_ext/py.typed", "dodoco_ext/_C.pyi"} <= installed
    assert "dodoco_ext/triton_kernels/__init__.py" in installed


def test_the_wheel_has_nothing_but_the_package(installed: set[str]) -> None:
    """A top-level `triton_kernels` would shadow another well-known package."""
    top = {path.split("/")[0] for path in installed if not path.startswith("../")}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dodoco_ext"}
    assert [Path(path).name for path in installed if path.startswith("../")] == ["dodoco"]
    leftovers = {
        path
        for path in installed
        if path.endswith(".py")
        and not (ROOT / path).exists()
        and not (ROOT / path.removeprefix("dodoco_ext/")).exists()
    }
    assert leftovers == set(), "modules that the sources no longer have"


def test_the_wheel_has_one_extension_module(installed: set[str]) -> None:
    modules = [path for path in installed if path.endswith(".so")]
    assert len(modules) == 1
    assert modules[0].startswith("dodoco_ext/_C.")


def test_torch_triton_and_engines_are_never_dependencies() -> None:
    required = importlib.metadata.requires("dodoco-ext") or []
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in required}  # type: ignore[index]
    assert names.isdisjoint({"torch", "triton", "vllm", "sglang", "megatron-core", "scipy"})
    base = {line for line in required if "extra ==" not in line}
    assert {re.match(r"[\w.-]+", line)[0] for line in base} == {"numpy", "click", "rich"}  # type: ignore[index]


def test_the_installed_package_imports_from_another_directory(tmp_path: Path) -> None:
    program = (
        "import sys, dodoco_ext, dodoco_ext._C, dodoco_ext.triton_kernels\n"
        "assert not {'torch', 'triton'} & set(sys.modules), 'heavy imports'\n"
        "print(dodoco_ext.__file__, dodoco_ext._C.__file__, sep='\\n')\n"
    )
    run = [sys.executable, "-P", "-c", program]
    out = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    package, extension = map(Path, out.split())
    assert package.parent != ROOT / "dodoco_ext", "the source folder was imported"
    assert extension.parent == package.parent


def test_the_command_runs_from_another_directory(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("dodoco")
    out = subprocess.run(
        [command, "--help"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "Usage" in out.stdout


def test_the_sdist_has_every_source_file(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for path in checkout_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    out = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True
    )
    with tarfile.open(tmp_path / out.stdout.split()[-1]) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    left_out = {str(path) for path in checkout_files()} - names
    assert {
        path for path in left_out if not path.startswith(("benchmarks/results/", ".git"))
    } == set()


def test_the_sources_name_no_machine() -> None:
    """No home folder, no path of this checkout, no registry host."""
    homes = "|".join(map(re.escape, {str(Path.home()), str(ROOT.parent), "/home/runner", "/Users"}))
    registries = "|".join(
        re.escape(host) for host in ("files.pythonhosted" + ".org", "pypi" + ".org")
    )
    pattern = re.compile(rf"(?<![\w.~-])(?:{homes})/\w|{registries}")
    found = []
    for path in checkout_files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data:
            lines = data.decode("utf-8").splitlines()
            found += [
                f"{path}:{i}: {line}" for i, line in enumerate(lines, 1) if pattern.search(line)
            ]
    assert found == []


def test_the_extension_module_names_no_machine(installed: set[str]) -> None:
    distribution = importlib.metadata.distribution("dodoco-ext")
    module = next(path for path in installed if path.endswith(".so"))
    content = Path(str(distribution.locate_file(module))).read_bytes()
    assert os.fsencode(ROOT) + b"/" not in content


def test_every_dependency_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    extras = pyproject["project"]["optional-dependencies"].values()
    required = pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
    required += [requirement for extra in extras for requirement in extra]
    names = {re.match(r"[\w.-]+", name)[0].lower().replace("_", "-") for name in required}  # type: ignore[index]
    assert names - pinned == set()


def test_the_source_folder_says_that_it_is_not_the_package(tmp_path: Path) -> None:
    copied = tmp_path / "dodoco_ext"
    shutil.copytree(ROOT / "dodoco_ext", copied, ignore=shutil.ignore_patterns("*.so"))
    program = "import dodoco_ext; dodoco_ext.open"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "run from another folder" in done.stderr


def test_tests_without_torch_are_those_of_the_reading_side() -> None:
    """What `make pythons` runs."""
    chosen = {file.name for file in reader_side.test_files()}
    reading = ("recording", "damage", "sources", "settings", "folders", "metrics", "nulls", "show")
    assert {f"test_{name}.py" for name in reading} <= chosen
    # By an import of its own, by one in a helper, and by pytest.importorskip.
    assert chosen.isdisjoint({"test_ops.py", "test_probes.py", "test_triton_route_stats.py"})
