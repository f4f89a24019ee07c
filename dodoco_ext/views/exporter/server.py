"""Where the metrics go: an HTTP server, a file for node_exporter, or standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry

from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.views.exporter.render import CONTENT_TYPE, render
from dodoco_ext.views.exporter.state import State

log = logging.getLogger("dodoco")

TEXTFILE = "dodoco.prom"
TEXT = "text/plain; charset=utf-8"
_TIMEOUT_S = 10.0  # for a client that does not say what it wants


def address_of(listen: str) -> tuple[str, int]:
    """Host and port of `--listen`, such as `127.0.0.1:9400` or `[::1]:9400`.

    Raises:
        InputError: It is no such address.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):(\d{1,5})", listen)
    if found is None or int(found[2]) > 65535:
        raise InputError(
            f"--listen {listen}: give HOST:PORT, such as 127.0.0.1:9400, or 0.0.0.0:9400 for every "
            "interface"
        )
    return found[1].strip("[]"), int(found[2])


class Server(ThreadingHTTPServer):
    """Serves `/metrics` and `/healthz` from a thread of its own.

    Args:
        address: Host and port; port 0: any that is free.
        registry: What `/metrics` shows.
        state: What `/healthz` asks.

    Raises:
        DodocoError: The address cannot be listened on.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, state: State) -> None:
        self.registry, self.state = registry, state
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise DodocoError(
                f"cannot listen on {address[0]}:{address[1]}: {error.strerror or error}: choose another "
                "address with --listen"
            ) from None
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/metrics"

    def close(self) -> None:
        """Stops serving."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _TIMEOUT_S
    server_version = "dodoco"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            try:
                code, kind, body = 200, CONTENT_TYPE, render(self.server.registry)
            except Exception as error:  # seen by Prometheus as a scrape that failed
                log.exception("a scrape failed")
                code, kind, body = 500, TEXT, f"{type(error).__name__}: {error}\n".encode()
            self._send(code, kind, body)
        elif path == "/healthz":
            problem = self.server.state.problem()
            body = f"{problem or 'ok'}\n".encode("utf-8", "replace")
            self._send(503 if problem else 200, TEXT, body)
        else:
            self._send(404, TEXT, b"/metrics and /healthz are here\n")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _send(self, code: int, content_type: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # a client that did not wait
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A line a scrape is of use to nobody."""


def write_textfile(registry: CollectorRegistry, folder: Path) -> Path:
    """Writes the metrics for node_exporter's textfile collector, which never sees half a file.

    Raises:
        DodocoError: The folder cannot be written to.
    """
    target = folder / TEXTFILE
    # Only *.prom is collected.
    partial = folder / f".{TEXTFILE}.{secrets.token_hex(4)}"
    try:
        partial.write_bytes(render(registry))
        partial.chmod(0o644)  # node_exporter is another user
        os.replace(partial, target)  # noqa: PTH105
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DodocoError(
            f"--textfile {folder}: {error.strerror}: give a folder that is there and can be written to"
        ) from None
    return target
