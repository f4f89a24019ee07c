"""Recordings with known content, made without torch, for tests of what reads them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.recorder import LayerSpec, Recorder, Uncovered
from dodoco_ext.settings import Settings

Ids = NDArray[np.int64]
_BOARD_SECTION, _RING_SECTION = 3, 4
_ASSIGNMENTS_WORD = 2
_LAYER_WORD = 1


def layers(number: int, num_experts: int = 8, top_k: int = 2) -> list[LayerSpec]:
    """Layers named as transformers names them."""
    return [LayerSpec(f"model.layers.{i}.mlp.gate", num_experts, top_k) for i in range(number)]


def random_ids(rng: np.random.Generator, tokens: int, layer: LayerSpec, skew: float = 0.0) -> Ids:
    """Distinct experts for each token, [tokens, k]; `skew` favours the later experts."""
    scores = rng.gumbel(size=(tokens, layer.num_experts))
    scores += skew * np.linspace(-1, 1, layer.num_experts)
    return np.ascontiguousarray(np.argsort(-scores, axis=1)[:, : layer.top_k or 2])


class Planted:
    """A recorder, and the sites to record passes at."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        *,
        labels: Mapping[str, str] | None = None,
        uncovered: Sequence[Uncovered] = (),
        settings: Settings | None = None,
    ) -> None:
        self.specs = specs
        self.recorder = Recorder(specs, labels=labels, uncovered=uncovered, settings=settings)
        self.path: Path = self.recorder.path
        self._sites = [np.zeros(_C.SITE_BYTES // 8, np.int64) for _ in specs]
        for index, site in enumerate(self._sites):
            self.recorder.bind(index, site, site.ctypes.data)

    def route(self, layer: int, ids: Ids | Sequence[Sequence[int]]) -> None:
        """Records one pass, ids [T, k]."""
        array = np.ascontiguousarray(ids, np.int64)
        rows, k = array.shape
        site, data = self._sites[layer].ctypes.data, array.ctypes.data
        assert _C.route_ids(site, data, array.itemsize, rows, k, k, 1, False) == 0

    def route_all(self, sizes: Sequence[int], skew: float = 0.0, seed: int = 0) -> None:
        """Records a pass of each size at every layer."""
        rng = np.random.default_rng(seed)
        for tokens in sizes:
            for index, spec in enumerate(self.specs):
                self.route(index, random_ids(rng, tokens, spec, skew))

    def close(self) -> Path:
        """Ends the recording."""
        self.recorder.close()
        return self.path


def recording(
    specs: Sequence[LayerSpec],
    sizes: Sequence[int] = (16, 16, 16),
    *,
    skew: float = 0.0,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """A closed recording of random passes."""
    planted = Planted(specs, labels=labels)
    planted.route_all(sizes, skew)
    return planted.close()


def dead_recording(folder: Path) -> Path:
    """A recording whose process was killed."""
    script = (
        "import os, signal, planted\n"
        "p = planted.Planted(planted.layers(2))\n"
        "p.route_all([4, 4])\n"
        "print(p.path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DODOCO_DIR": str(folder), "PYTHONPATH": paths},
    )
    assert done.returncode == -9, done.stderr
    return Path(done.stdout.strip())


def _section(data: bytearray, kind: int) -> int:
    """Offset of the first section of a kind."""
    sections = [struct.unpack_from("<IIQQQQ", data, 248 + 40 * i) for i in range(4)]
    return int(next(section[2] for section in sections if section[0] == kind))


def tear(path: Path) -> None:
    """Makes the first layer look as if a pass was being written: one assignment too many."""
    data = bytearray(path.read_bytes())
    offset = _section(data, _BOARD_SECTION) + 8 * _ASSIGNMENTS_WORD
    (assignments,) = struct.unpack_from("<Q", data, offset)
    struct.pack_into("<Q", data, offset, assignments + 1)
    path.write_bytes(data)


def spoil(path: Path) -> None:
    """Makes the first record of the ring one of a layer that does not exist."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, _section(data, _RING_SECTION) + 128 + 8 * _LAYER_WORD, 999)
    path.write_bytes(data)
