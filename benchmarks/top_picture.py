"""The picture of `dodoco top` in the README: `python benchmarks/top_picture.py docs/images/top.svg`.

Four ranks of a model with 24 layers route made-up tokens for a made-up minute; nothing is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from dodoco_ext import _C
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.settings import Settings
from dodoco_ext.views.top.app import TopApp
from dodoco_ext.views.top.session import Session

LAYERS, EXPERTS, TOP_K, RANKS = 24, 64, 6, 4
SECONDS, TOKENS = 60, 96


class Rank:
    """A recording of one rank, and the sites to record passes at."""

    def __init__(self, folder: Path, rank: int) -> None:
        specs = [LayerSpec(f"model.layers.{i}.mlp.gate", EXPERTS, TOP_K) for i in range(LAYERS)]
        settings = Settings(folder, 1 << 20, run="demo", rank=rank, world_size=RANKS)
        self._recorder = Recorder(specs, settings=settings)
        self._sites = [np.zeros(_C.SITE_BYTES // 8, np.int64) for _ in specs]
        for index, site in enumerate(self._sites):
            self._recorder.bind(index, site, site.ctypes.data)

    def route(self, layer: int, logits: np.ndarray, rng: np.random.Generator) -> None:
        """One pass of tokens that choose by noisy logits."""
        scores = logits + rng.gumbel(size=(TOKENS, EXPERTS))
        ids = np.ascontiguousarray(np.argsort(-scores, axis=1)[:, :TOP_K])
        address = self._sites[layer].ctypes.data
        _C.route_ids(address, ids.ctypes.data, 8, TOKENS, TOP_K, TOP_K, 1, False)

    def close(self) -> None:
        """Ends the recording."""
        self._recorder.close()


def picture(size: tuple[int, int]) -> str:
    """The view after a minute, as SVG."""
    rng = np.random.default_rng(7)
    skews = rng.uniform(0.05, 0.9, LAYERS)[:, None] * rng.standard_normal((LAYERS, EXPERTS))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DODOCO_DIR"] = folder
        ranks = [Rank(Path(folder), rank) for rank in range(RANKS)]
        svg = asyncio.run(_minute(ranks, skews, rng, size))
        for rank in ranks:
            rank.close()
    return svg


async def _minute(
    ranks: list[Rank], skews: np.ndarray, rng: np.random.Generator, size: tuple[int, int]
) -> str:
    session = Session("demo")
    session.look(0.0)
    for second in range(1, SECONDS + 1):
        drift = 1 + 0.6 * np.sin(second / 9 + np.arange(LAYERS))[:, None]
        for rank in ranks:
            for layer, logits in enumerate(skews * drift):
                rank.route(layer, logits, rng)
        frame = session.look(float(second))
    app = TopApp(session, interval_s=None)
    async with app.run_test(size=size) as pilot:
        app.frame = frame
        await pilot.press("2")
        await pilot.pause()
        svg = app.export_screenshot(title="dodoco top")
    return without_remote_fonts(svg)


def without_remote_fonts(svg: str) -> str:
    """A picture that loads nothing: any monospaced font will do."""
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", svg, flags=re.DOTALL)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(110, 32), metavar=("W", "H"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(picture(tuple(given.size)), encoding="utf-8")


if __name__ == "__main__":
    main()
