"""AlltoAll time against imbalance, at equal bytes: uniform, Zipf and recorded traffic over gloo.

`python benchmarks/dispatch_imbalance.py` prints a table of docs/alltoall.md, with `--mbit 200` the other. Every
traffic is one matrix [R, R] of rows, scaled to the same total; all are sent in turn by the same processes, and
what arrives is looked at. The recorded one is a dispatch of this repository's MoE layer, read from its recording.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe
from links import Links
from numpy.typing import NDArray

from dodoco_ext.capture import DISPATCH
from dodoco_ext.intervals import bootstrap_interval
from dodoco_ext.recording import Reader

Matrix = NDArray[np.int64]
TESTS = Path(__file__).parents[1] / "tests"


def scaled(weights: NDArray[np.float64], rows: int) -> Matrix:
    """A matrix of `rows` rows in all, as near to the weights as whole rows allow."""
    exact = weights / weights.sum() * rows
    matrix = np.floor(exact).astype(np.int64)
    rest = rows - int(matrix.sum())
    largest = np.argsort((matrix - exact).ravel(), kind="stable")[:rest]
    matrix.ravel()[largest] += 1
    return matrix


def zipf(ranks: int, exponent: float) -> NDArray[np.float64]:
    """All sources alike, destinations by rank."""
    return np.tile((1.0 + np.arange(ranks)) ** -exponent, (ranks, 1))


def recorded(ranks: int) -> NDArray[np.float64]:
    """What a skewed MoE layer sent in one dispatch."""
    sys.path.insert(0, str(TESTS))
    from alltoall_job import Job, run

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DODOCO_DIR"] = f"{folder}/recordings"
        results = run(Job(folder, ranks, layers=1, iterations=1, tokens=256, experts=4 * ranks))
        rows = []
        for result in results:
            found = Reader(result["path"]).transfers()
            rows.append(found.sent[found.records["type"] == DISPATCH][0])
    return np.array(rows, dtype=np.float64)


def send(rank: int, matrices: dict[str, Matrix], hidden: int, rounds: int, meeting: str) -> Any:
    """Sends every traffic in turn; seconds of each call, slowest rank's.

    Raises:
        AssertionError: Something else arrived than what was sent.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    ranks = len(next(iter(matrices.values())))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    calls, expected = {}, {}
    most = max(int(matrix.sum(1).max()) for matrix in matrices.values())
    for name, matrix in matrices.items():
        sent, received = matrix[rank].tolist(), matrix[:, rank].tolist()
        # A row is a number of its own, below 2**24: whose it is, and which one.
        rows = (rank * most + torch.arange(float(sum(sent)))).unsqueeze(1).expand(-1, hidden)
        calls[name] = (torch.empty(sum(received), hidden), rows.contiguous(), received, sent)
        first = matrix[:, :rank].sum(1)  # of a source's rows, those before mine
        expected[name] = torch.cat(
            [
                source * most + int(first[source]) + torch.arange(float(number))
                for source, number in enumerate(received)
            ]
        )
    seconds: dict[str, list[float]] = {name: [] for name in matrices}
    order = np.random.default_rng(0)  # the same in all ranks
    for turn in range(rounds + 2):
        for name in order.permutation([*calls]):
            calls[name][0].fill_(-1)
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(*calls[name])
            dist.barrier()  # the slowest rank's time is everybody's
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
            assert torch.equal(calls[name][0], expected[name].unsqueeze(1).expand(-1, hidden))
    dist.destroy_process_group()
    return seconds


def run_ranks(
    matrices: dict[str, Matrix], asked: argparse.Namespace, links: Links | None
) -> dict[str, list[float]]:
    """Forks the ranks; what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Rank(rank, matrices, asked, links, folder) for rank in range(asked.ranks)]
        try:
            for rank in ranks:
                rank.connect()
            for rank in ranks:
                rank.start()
            for _ in (
                ranks
            ):  # in the order in which they end: one that fails must not be waited for by others
                _, status = os.wait()
                if status:
                    sys.exit("a rank failed")
        finally:
            for rank in ranks:
                rank.end()
        return dict(json.loads(Path(folder, "0").read_text()))


class Rank:
    """A forked process that waits for its link, then for the others."""

    def __init__(
        self,
        number: int,
        matrices: dict[str, Matrix],
        asked: argparse.Namespace,
        links: Links | None,
        folder: str,
    ) -> None:
        self._number, self._links = number, links
        self._told, tell = os.pipe()
        listen, self._gate = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                os.close(self._gate)
                if links:
                    links.leave_host()
                os.write(tell, b".")
                if os.read(listen, 1):
                    meeting = f"file://{folder}/meeting"
                    seconds = send(number, matrices, asked.hidden, asked.rounds, meeting)
                    Path(folder, str(number)).write_text(json.dumps(seconds))
                    status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(tell)

    def connect(self) -> None:
        """Gives it a link once it has a namespace."""
        if os.read(self._told, 1) and self._links:
            self._links.connect(self._number, self._pid)

    def start(self) -> None:
        """Lets it begin."""
        os.write(self._gate, b".")

    def end(self) -> None:
        """Kills what still runs."""
        os.close(self._gate)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16384, help="rows in each AlltoAll, all ranks")
    parser.add_argument("--hidden", type=int, default=512, help="float32 values in a row")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--mbit",
        type=float,
        help="give each rank a link of so many Mbit/s in each direction (Linux, root)",
    )
    asked = parser.parse_args()
    links = None
    if asked.mbit is not None and asked.mbit <= 0:
        parser.error(f"--mbit {asked.mbit:g}: give a rate above 0")
    if asked.mbit and os.geteuid() != 0:
        parser.error("--mbit makes network namespaces: run this as root, or without it")
    if asked.mbit:
        Links.enter()
        links = Links(asked.mbit)
    weights = {
        "uniform": np.ones((asked.ranks, asked.ranks)),
        "Zipf 0.5": zipf(asked.ranks, 0.5),
        "Zipf 1.0": zipf(asked.ranks, 1.0),
        "Zipf 2.0": zipf(asked.ranks, 2.0),
        "recorded": recorded(asked.ranks),
    }
    matrices = {name: scaled(each, asked.rows) for name, each in weights.items()}
    assert {int(matrix.sum()) for matrix in matrices.values()} == {asked.rows}
    seconds = run_ranks(matrices, asked, links)
    row_bytes = asked.hidden * 4
    where = f"links of {asked.mbit:g} Mbit/s" if asked.mbit else "the memory of one machine"
    print(
        f"{asked.ranks} ranks over gloo and {where}, {asked.rows * row_bytes / 2**20:.0f} MiB in each AlltoAll"
    )
    print(
        "| traffic | received, max/mean | busiest link and direction, MiB | at least, ms | ms | over uniform |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    busiest = {name: through_one_link(matrix) * row_bytes for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        received = matrix.sum(0)
        bound = f"{busiest[name] * 8e-3 / asked.mbit:.0f}" if asked.mbit else "-"
        ratio = np.array(seconds[name]) / np.array(seconds["uniform"])
        low, high = bootstrap_interval(
            ratio, np.median, np.arange(len(ratio)) * 40 // len(ratio), num_resamples=500
        )
        print(
            f"| {name} | {received.max() / received.mean():.2f} | {busiest[name] / 2**20:.1f} | "
            f"{bound} | {np.median(seconds[name]) * 1e3:.1f} | "
            f"{np.median(ratio):.2f} [{low:.2f}, {high:.2f}] |"
        )
    print("\nMeasured on: " + ", ".join(f"{key} {value}" for key, value in describe().items()))
    return 0


def through_one_link(matrix: Matrix) -> int:
    """Rows through the busiest link in its busier direction; what a rank sends itself crosses none."""
    apart = matrix - np.diag(np.diag(matrix))
    return int(max(apart.sum(0).max(), apart.sum(1).max()))


if __name__ == "__main__":
    sys.exit(main())
