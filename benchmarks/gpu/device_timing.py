"""Time on the device: graphs whose replays take turns, and queues that the host filled in advance.

As in `interleave.py`, contestants run in a random order in every round and statements are about rounds;
here the clock is the device's, read by events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.interleave import Timings

from .place import Place

WARM_UPS = 3
# So many clock cycles (a few hundred microseconds) let the host get ahead of the device by some graphs,
HEAD_START_CYCLES = 600_000
# and so many (some 15 ms) by MAX_QUEUED calls of several kernels each. The driver makes the host wait
# when about a thousand kernels are in flight.
QUEUE_CYCLES, MAX_QUEUED = 30_000_000, 60


def capture(
    place: Place, run: Callable[[], object], nodes: int, stream: Any, pool: Any = None
) -> Any:
    """A graph of `nodes` calls, warmed up and captured on one stream."""
    cuda = place.cuda
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    stream.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=stream, pool=pool):
        for _ in range(nodes):
            run()
    cuda.current_stream().wait_stream(stream)
    return graph


def interleave_graphs(
    place: Place,
    graphs: Mapping[str, Any],
    *,
    rounds: int,
    nodes: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    replays: int = 1,
    seed: int = 0,
) -> Timings:
    """Times graphs in turn.

    Args:
        place: Where.
        graphs: By name.
        rounds: Rounds.
        nodes: Calls in each graph: times are those of one.
        prepare: Called before a graph's replays, in the stream and outside the events, by name.
        replays: Replays between two events.
        seed: Seed of the order.

    Returns:
        Seconds a call, [rounds] each.
    """
    cuda, prepare = place.cuda, prepare or {}
    names = list(graphs)
    seconds = {name: np.empty(rounds) for name in names}
    order = np.random.default_rng(seed)
    for graph in graphs.values():
        graph.replay()
    cuda.synchronize()
    for number in range(rounds):
        # One head start a round: then the device never waits for the host between two events.
        cuda._sleep(HEAD_START_CYCLES)
        events = {}
        for name in order.permutation(names):
            prepare.get(name, _nothing)()
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
            events[name] = begin, end
        cuda.synchronize()
        for name, (begin, end) in events.items():
            seconds[name][number] = begin.elapsed_time(end) / 1e3 / (nodes * replays)
    return Timings(seconds)


def queued(
    place: Place, contestants: Mapping[str, Callable[[], object]], *, rounds: int, calls: int
) -> Timings:
    """Times eager calls on the device, without the host: they queue up behind a pause.

    Calls that wait for the device cannot be timed so.
    """
    cuda = place.cuda
    assert calls <= MAX_QUEUED, calls
    names = list(contestants)
    seconds = {name: np.empty(rounds) for name in names}
    order = np.random.default_rng(0)
    for number in range(rounds):
        for name in order.permutation(names):
            run = contestants[name]
            cuda.synchronize()
            cuda._sleep(QUEUE_CYCLES)
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            cuda.synchronize()
            seconds[name][number] = begin.elapsed_time(end) / 1e3 / calls
    return Timings(seconds)


def _nothing() -> None: ...
