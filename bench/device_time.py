"""Times on a GPU: of the device by replays of captured graphs, of the host by calls that nothing waits for.

A graph holds a work once for each of several sets of inputs, so that a replay moves more bytes than the L2 cache keeps
and costs the host one launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Work = Callable[[], object]
# A set of inputs comes back to the cache after this many times the cache's size has gone through it.
CACHES = 3
# Calls of a round of host time: fewer launches than a GPU's queue takes before the host has to wait.
CALLS, ROUNDS = 8, 7


def sets_for(least_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, of which a work moves `least_bytes` each, exceed the L2 cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHES * cache // max(least_bytes, 1)))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream other than the default one, on which works are prepared, warmed up and captured: a backward pass runs on
    the stream of its forward pass, and cannot be captured on another."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def device_times(works: Sequence[Work], repeats: int) -> list[float]:
    """Seconds that one work takes on the device, by each of `repeats` replays of a graph of all works in turn.

    Called on a side stream, with works that are compiled.
    """
    stream = torch.cuda.current_stream()
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        # Results are kept, else each would be written over the one before it, in the cache.
        kept = [work() for work in works]
    for _ in range(3):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept
    return [1e-3 * begin.elapsed_time(end) / len(works) for begin, end in events]


def host_times(work: Work, calls: int = CALLS, rounds: int = ROUNDS) -> list[float]:
    """Seconds that the host takes for a call, by each of several rounds; on a GPU the device works on behind it."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        work()
    seconds = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - begin) / calls)
    synchronize()
    return seconds
