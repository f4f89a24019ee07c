"""The process `dodoco metrics`: its server, its file, its one-time print, and its ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dodoco_ext.cli import run
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.views.exporter import observe
from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.server import TEXTFILE, Server, address_of
from dodoco_ext.views.exporter.state import State
from exposed import Exposed, parsed
from served import Served, server, work

TIMEOUT_S = 60


@contextlib.contextmanager
def exporter(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dodoco metrics`, at any free port, and its address."""
    command = [sys.executable, "-m", "dodoco_ext", "metrics", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            for line in child.stderr:
                if found := re.search(r"http://\S+", line):
                    yield child, found[0].removesuffix("/metrics")
                    break
            else:
                pytest.fail("dodoco metrics has ended before it served")
        finally:
            child.kill()


def get(address: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def metrics_of(address: str) -> Exposed:
    code, content_type, body = get(f"{address}/metrics")
    assert (code, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return parsed(body)


def test_it_serves_metrics_and_its_health_and_ends_when_told() -> None:
    made = Served()
    made.route_all(4)
    with exporter() as (child, address):
        assert metrics_of(address).one("tokens_total", layer=made.specs[0].name) == 4
        made.route_all(4)
        assert metrics_of(address).one("tokens_total", layer=made.specs[0].name) == 8
        assert get(f"{address}/healthz")[::2] == (200, "ok\n")
        assert get(f"{address}/elsewhere")[0] == 404
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT_S) == 0


def test_its_own_clock_ends_windows_and_reads_transfers() -> None:
    ranks = server(2)
    with exporter("--window", "1") as (_, address):
        end = time.monotonic() + TIMEOUT_S
        wanted = {"dodoco_window_gini_corrected", "dodoco_alltoall_wait_seconds_total"}
        while not wanted <= set(seen := metrics_of(address)):
            assert time.monotonic() < end, f"only {sorted(seen)}"
            work(ranks, tokens=64, late=0, late_ns=1000)
            time.sleep(0.1)


def test_only_this_machine_is_listened_to_unless_asked() -> None:
    with exporter() as (_, address):
        port = int(address.rsplit(":", 1)[1])
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        for other in others - {"127.0.0.1", "::1"}:
            if not other.startswith("127."):
                with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):  # noqa: PT011
                    pass
        with Path("/proc/net/tcp").open() as table:
            listening = [line.split()[1] for line in table if f":{port:04X} " in line]
    assert f"0100007F:{port:04X}" in listening
    assert not any(entry.startswith("00000000") for entry in listening)


def test_a_folder_that_may_not_be_listed_is_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """To root, who runs this in CI, no folder is closed."""
    state = State([Path("/closed")])
    refusing = [True]

    def find(_: object) -> list[object]:
        if refusing[0]:
            raise RecordingError("/closed: Permission denied", "unreadable")
        return []

    monkeypatch.setattr(observe, "find", find)
    state.update()
    with contextlib.closing(Server(("127.0.0.1", 0), registry_of(state), state)) as served:
        address = served.url.removesuffix("/metrics")
        assert get(f"{address}/healthz")[::2] == (503, "/closed: Permission denied\n")
        assert metrics_of(address).of("recorder_up") == {}
        refusing[0] = False
        state.update()
        assert get(f"{address}/healthz")[0] == 200


def test_a_scrape_that_fails_is_an_error_to_prometheus_and_the_next_one_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = State()
    with contextlib.closing(Server(("127.0.0.1", 0), registry_of(state), state)) as served:
        with monkeypatch.context() as patch:
            patch.setattr(State, "update", lambda _: 1 // 0)
            code, _, body = get(served.url)
        assert (code, body.startswith("ZeroDivisionError")) == (500, True)
        assert get(served.url)[0] == 200


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    with exporter(str(folder)) as (_, address):
        assert get(f"{address}/healthz")[0] == 200
        assert metrics_of(address).of("recorder_up") == {}
        made = Served(folder=folder)
        assert made.path.parent == folder
        assert set(metrics_of(address).of("recorder_up").values()) == {1}


def test_once_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    Served().route_all(4)
    assert run(["metrics", "--once"]) == 0
    seen = parsed(capsys.readouterr().out)
    assert set(seen.by("layer", "tokens_total").values()) == {4}


def test_the_options_reach_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    Served().route_all(4)
    assert run(["metrics", "--once", "--per-expert"]) == 0
    assert len(parsed(capsys.readouterr().out).of("expert_assignments_total")) == 16


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "node_exporter"
    folder.mkdir()
    return folder


def test_the_textfile_is_whole_and_for_others_to_read(target: Path) -> None:
    Served().route_all(4)
    assert run(["metrics", "--once", "--textfile", str(target)]) == 0
    (file,) = target.iterdir()
    assert file.name == TEXTFILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert set(parsed(file.read_text()).by("layer", "tokens_total").values()) == {4}


def test_the_textfile_is_written_again_and_again(target: Path) -> None:
    made = Served(layers=1)
    command = [sys.executable, "-m", "dodoco_ext", "metrics", "--textfile", str(target)]
    with subprocess.Popen([*command, "--interval", "1"]) as child:
        end = time.monotonic() + TIMEOUT_S
        file, counted = target / TEXTFILE, set()
        while len(counted) < 3:
            assert time.monotonic() < end, counted
            made.route_all(2)
            if file.exists():
                counted |= set(parsed(file.read_text()).by("layer", "tokens_total").values())
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(TIMEOUT_S) == 0
    assert [each.name for each in target.iterdir()] == [TEXTFILE]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "9400"], "give HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "give HOST:PORT"),
        (["--textfile", "/nowhere/at/all", "--once"], "--textfile /nowhere/at/all"),
        ([__file__, "--once"], "is no folder"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["metrics", *arguments]) == 1
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert said in found.err


def test_an_address_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "dodoco_ext", "metrics", "--listen", address]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on {address}" in done.stderr


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9400", ("127.0.0.1", 9400)),
        ("[::1]:80", ("::1", 80)),
        ("some.host-1:0", ("some.host-1", 0)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["", ":9400", "::1:80", "host", "host:", "host:x", "a:b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError, match="give HOST:PORT"):
        address_of(text)


def test_without_prometheus_client_the_error_names_the_extra() -> None:
    script = "import sys; sys.modules['prometheus_client'] = None\n"
    script += "from dodoco_ext.cli import run; sys.exit(run(['metrics', '--once']))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'dodoco-ext[prometheus]'" in done.stderr


def test_it_loads_neither_torch_nor_a_writer() -> None:
    script = (
        "import json, sys\nfrom dodoco_ext.cli import run\nrun(['metrics', '--once'])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    ours = {"dodoco_ext.recorder", "dodoco_ext.ops", "dodoco_ext.attachment"}
    assert "prometheus_client" in loaded
    assert loaded & {"torch", "triton", "pandas", "rich", *ours} == set()
