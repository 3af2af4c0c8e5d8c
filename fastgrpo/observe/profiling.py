"""torch profiler traces of chosen iterations, and on a GPU the history of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

# Allocations and frees that a memory snapshot keeps.
HISTORY = 100_000


@contextlib.contextmanager
def profiled(folder: Path, iteration: int, rank: int) -> Iterator[None]:
    """Traces the block into `folder`/iteration-000020-rank-0.json.gz, for chrome://tracing or ui.perfetto.dev.

    Operators with shapes and memory, on the CPU and the GPU where there is one, below the phases' names. On a GPU,
    allocations go to a .pickle beside it, for pytorch.org/memory_viz; fastgrpo never reads it. Tracing makes an
    iteration slower: its times are not the run's.
    """
    from torch.profiler import ProfilerActivity, profile

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"iteration-{iteration:06d}-rank-{rank}"
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as tracer:
        yield
    if cuda:
        torch.cuda.memory._dump_snapshot(str(target.with_suffix(".pickle")))
        torch.cuda.memory._record_memory_history(enabled=None)
    tracer.export_chrome_trace(str(target.with_suffix(".json.gz")))
