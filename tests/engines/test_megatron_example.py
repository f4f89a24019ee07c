"""The example of docs/megatron.md trains, records, and writes to a real TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import dodoco_ext
from megatron_processes import HOME, needs_megatron, run_ranks

pytestmark = [pytest.mark.engine, needs_megatron, pytest.mark.timeout(300)]

READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


def test_the_example_trains_records_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    script = Path(__file__).with_name("megatron_example.py")
    run_ranks(script, 2, tmp_path, "--steps", "20", "--log-interval", "10")

    environment = {**os.environ, "PYTHONPATH": HOME}
    command = [sys.executable, "-c", READ, str(tmp_path / "board")]
    scalars = json.loads(subprocess.check_output(command, env=environment, text=True))
    assert [step for step, _ in scalars["moe/local_gini_p90"]] == [10, 20]
    assert {"moe/local_corrected_gini_max", "moe/local_max_over_mean_p95"} <= scalars.keys()
    losses = [value for _, value in scalars["loss"]]
    assert losses[1] < losses[0]

    paths = sorted((tmp_path / "recordings").glob("*.dodoco"))
    assert len(paths) == 2
    for index, path in enumerate(paths):
        reader = dodoco_ext.Reader(path)
        assert (reader.group.ranks, reader.group.index) == ((0, 1), index)
        totals = reader.traffic()
        assert len(totals) == 8  # four layers, dispatch and combine
        assert all(t.executions == t.backward == 40 and not t.recomputed for t in totals)
        # 4 sequences of 64 tokens, each to two experts.
        assert sum(int(t.sent.sum()) for t in totals[::2]) == 4 * 40 * 512
