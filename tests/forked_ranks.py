"""Ranks that are forked from one process, so that what they need is imported once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_ranks(ranks: int, folder: Path, work: Callable[[int], object]) -> int:
    """Does `work(rank)` in each; what it returns goes to `rank-N.json`.

    Returns:
        An exit code: 1 if a rank failed, which then says why on stderr.
    """
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ["DODOCO_RANK"] = str(rank)
                os.environ["DODOCO_WORLD_SIZE"] = str(ranks)
                (folder / f"rank-{rank}.json").write_text(json.dumps(work(rank)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    failed = [os.waitpid(child, 0)[1] != 0 for child in children]
    return int(any(failed))
