"""The statement of tests/test_alltoall_gloo.py for more ranks than CI has time for.

`python benchmarks/alltoall_ranks.py 16 32` from the checkout: real processes over gloo, matrices rebuilt
from their recordings held against each rank's own routing maps.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int, nargs="+", help="processes of each run")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from alltoall_job import Job, run
    from test_alltoall_gloo import check

    for ranks in asked.ranks:
        for recompute in ("", "saved"):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["DODOCO_DIR"] = f"{folder}/recordings"
                os.environ["DODOCO_MAX_BYTES"] = str(1 << 20)
                began = time.perf_counter()
                job = Job(folder, ranks, experts=2 * ranks, recompute=recompute)
                results = run(job, timeout_s=900)
                check(job, results)
                what = "with recomputation" if recompute else "forward and backward"
                print(
                    f"{ranks} ranks, {job.layers} layers, {job.iterations} iterations, {what}: every matrix "
                    f"equals the routing maps ({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
