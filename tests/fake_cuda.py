"""The fake CUDA driver of tests/cpp/fake_cuda.cpp, built, loaded and spoken to."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
_RUN = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint, use_errno=False
)


class Launch(NamedTuple):
    """A kernel that was launched, with what it was given."""

    name: str
    programs: int
    threads: int
    shared_bytes: int
    stream: int
    data: int
    control: int
    totals: int
    board: int
    layer: int
    top_k: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    recomputed: int
    scratch: tuple[int, int]


class Live(NamedTuple):
    """What the driver still holds for somebody."""

    allocations: int
    registrations: int
    contexts: int
    modules: int
    streams: int


@cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="dodoco-fake-cuda-"))
    try:
        target = folder / "libcuda.so.1"
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-shared", "-fPIC"]
        command += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"]
        command += [f"-I{HERE.parent / 'csrc'}", str(HERE / "cpp" / "fake_cuda.cpp")]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(target)], check=True)
        # Found by its SONAME from now on, wherever the file is.
        library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    finally:
        shutil.rmtree(folder)
    library.fake_calls.restype = ctypes.c_char_p
    library.fake_launch.restype = ctypes.c_char_p
    library.fake_capture.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.fake_clock.argtypes = [ctypes.c_uint64]
    return library


class FakeCuda:
    """The driver as a test sees it. One a process; `reset()` before each test."""

    def __init__(self, num_devices: int = 1) -> None:
        self._library = _library()
        self._library.fake_reset(num_devices)
        self._library.fake_use_device(0)
        self._run: object = None

    def fail(self, name: str, *, after: int = 0, code: int = 2, sticky: bool = False) -> None:
        """Lets a later call of `name` fail; `sticky`: and every call of anything from then on."""
        self._library.fake_fail(name.encode(), after, -code if sticky else code)

    def recover(self) -> None:
        """Ends a sticky failure."""
        self._library.fake_recover()

    def settle(self) -> None:
        """Lets all streams do what is in them."""
        self._library.fake_settle()

    def use_device(self, device: int | None) -> None:
        """Makes a device current in this thread; None: none, as in a thread that ran nothing yet."""
        self._library.fake_use_device(-1 if device is None else device)

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """Captures what is launched in a stream: it is not run."""
        self._library.fake_capture(stream, 1)
        try:
            yield
        finally:
            self._library.fake_capture(stream, 0)

    def replay(self) -> None:
        """Runs what was captured of transfers once more."""
        self._library.fake_replay()

    def be_quiet(self) -> None:
        """Launches only return from now on: for timing what comes before them."""
        self._library.fake_quiet()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Lets launches wait inside, as in a stream that has no room; for five seconds at most."""
        self._library.fake_full(1)
        try:
            yield
        finally:
            self._library.fake_full(0)

    def waiting(self) -> int:
        """Launches that wait for room."""
        return int(self._library.fake_waiting())

    def set_clock(self, now: int) -> None:
        """What the device's clock shows."""
        self._library.fake_clock(now)

    def run_with(
        self, run: Callable[[str, list[int], int], None], *, at_once: bool = False
    ) -> None:
        """Hands launched kernels to `run(name, arguments, programs)`, when their stream settles."""

        def call(name: bytes, arguments: ctypes._Pointer[ctypes.c_uint64], programs: int) -> None:
            run(name.decode(), [arguments[i] for i in range(13)], programs)

        self._run = _RUN(call)
        self._library.fake_run(self._run, int(at_once))

    def calls(self) -> list[str]:
        """Names of all calls since the last reset, in order."""
        return self._library.fake_calls().decode().split()

    @contextmanager
    def calls_made(self) -> Iterator[list[str]]:
        """Collects the names of the calls made inside."""
        before, made = len(self.calls()), list[str]()
        yield made
        made += self.calls()[before:]

    def launches(self) -> list[Launch]:
        """All launches but those of clock kernels."""
        found = []
        for index in range(self._library.fake_num_launches()):
            words = (ctypes.c_uint64 * 17)()
            name = self._library.fake_launch(index, words).decode()
            *numbers, one, two = (n - (1 << 64) if n >= 1 << 63 else n for n in words)
            found.append(Launch(name, *numbers, (one, two)))
        return found

    def live(self) -> Live:
        """What is not given back."""
        counts = (ctypes.c_int * 5)()
        self._library.fake_live(counts)
        return Live(*counts)
