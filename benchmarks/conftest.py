"""`pytest --benchmark benchmarks`: what recording costs, with pytest-benchmark and interleaved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dodoco_ext.settings import SHARED_MEMORY

from .environment import describe
from .figures import Figures

_FIGURES = pytest.StashKey[Figures]()
_ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest turns argparse's abbreviations off, so --benchmark is none of pytest-benchmark's
    # --benchmark-* options.
    group = parser.getgroup("dodoco benchmarks")
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="dodoco_benchmark",
        help="run the benchmarks; without it they are skipped",
    )
    group.addoption(
        "--benchmark-strict",
        action="store_true",
        dest="dodoco_strict",
        help="fail where a median is beyond its limit; otherwise only where a whole interval is",
    )
    group.addoption(
        "--benchmark-results",
        metavar="PATH",
        type=Path,
        dest="dodoco_results",
        help="write machine, versions and all figures to this JSON file",
    )
    group.addoption(
        "--benchmark-effort",
        metavar="FACTOR",
        type=float,
        default=1.0,
        dest="dodoco_effort",
        help="number of blocks in units of the usual one: 0.1 for a quick look",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures(
        strict=config.getoption("dodoco_strict"), effort=config.getoption("dodoco_effort")
    )
    if config.getoption("dodoco_benchmark"):
        config.stash[_ENVIRONMENT] = describe()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("dodoco_benchmark"):
        return
    skip = pytest.mark.skip(reason="a benchmark: run it with --benchmark")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("dodoco_results")
    if path is not None and _ENVIRONMENT in session.config.stash:
        session.config.stash[_FIGURES].write(path, session.config.stash[_ENVIRONMENT])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    figures = config.stash[_FIGURES]
    if figures.tables:
        terminalreporter.section("what recording costs")
        for line in figures.markdown(config.stash[_ENVIRONMENT]).splitlines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where benchmarks put what they measure."""
    return request.config.stash[_FIGURES]


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the benchmark's own for recordings: in memory, as in production."""
    for name in ("DODOCO_MAX_BYTES", "DODOCO_RECORD_EVERY", "DODOCO_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dodoco-benchmark-", dir=memory) as folder:
        monkeypatch.setenv("DODOCO_DIR", folder)
        yield Path(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, so that CPU time is neither shared nor spent on spinning at a barrier."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
