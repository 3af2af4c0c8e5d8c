"""Speed and peak memory of the operations on this device, beside PyTorch as trainers write it.

On a GPU times are the device's, by replays of captured graphs over inputs that exceed the L2 cache, with the host's
time of a call beside them; a copy in the same process is what they are a share of. Each row is written at once.

fastgrpo bench kernels [--shape flux] [--op loss] [--provider ours] [--mode full] [--repeats 20]
fastgrpo bench compare --base main
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgrpo.errors import UserError, require
from fastgrpo.observe.nvml import Board

from . import device_time, tables
from .providers import OPERATIONS, PROVIDERS, SHAPES, Inputs, least_bytes, prepare
from .tables import DATA, ROOT, Row, chosen, device_slug, read

DOCUMENT = ROOT / "docs" / "results.md"
MARKS = ("<!-- kernels table -->\n", "<!-- end of kernels table -->\n")
# The table that the document shows.
SHOWN = DATA / "kernels-cpu-x86-64-1-threads.csv"
KEY = ("op", "mode", "provider", "shape", "dtype")
COLUMNS = (
    *KEY, "p20_ms", "p50_ms", "p80_ms", "cpu_ms", "host_us", "gb_per_s", "of_copy", "peak_mib", "launches", "repeats",
    "threads", "clock_mhz", "power_w", "throttle", "torch", "commit",
)  # fmt: skip
COPY_BYTES = 1 << 28

# Seconds of a run by the clock, and of this process at work: on a busy machine they differ.
Times = tuple[float, float]


def run(
    ops: list[str] | None, shapes: list[str] | None, providers: list[str] | None, modes: list[str] | None, repeats: int
) -> None:
    """Measure, print, and put rows and plot of this device into bench/data, and the rows shown into docs/results.md.

    Raises UserError where a row could not be measured, after the others.
    """
    table = DATA / f"kernels-{device_slug()}.csv"
    rows, failed = [], []
    for row in measure(ops, shapes, providers, modes, repeats, failed):
        # At once: what ends the measurement keeps the rows before it.
        tables.upsert(table, [row], KEY, COLUMNS)
        print(" ".join(f"{row[name]}" for name in KEY), f"{row['p50_ms']} ms, {row['of_copy']} of a copy", flush=True)
        rows.append(row)
    if rows:
        plot(read(table), table.with_suffix(".png"))
        if table == SHOWN:
            DOCUMENT.write_text(document(), encoding="utf-8")
        tables.show(f"{device_slug()}, torch {torch.__version__}", rows, COLUMNS[: COLUMNS.index("repeats")], KEY)
    if failed:
        raise UserError("bench kernels: not measured: " + "; ".join(failed))


def measure(
    ops: list[str] | None,
    shapes: list[str] | None,
    providers: list[str] | None,
    modes: list[str] | None,
    repeats: int,
    failed: list[str] | None = None,
) -> Iterator[Row]:
    """One row for each chosen operation, mode, provider and shape, model outputs in bfloat16, as it is measured.

    On a GPU what fails is told in `failed`, where that is given, and the others are measured still.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops, shapes = chosen("bench kernels", "op", ops, OPERATIONS), chosen("bench kernels", "shape", shapes, SHAPES)
    providers = chosen("bench kernels", "provider", providers, PROVIDERS)
    on = _on_gpu if device.type == "cuda" else _on_cpu
    return on(device, ops, shapes, providers, modes, repeats, failed)


def _on_cpu(
    device: torch.device,
    ops: list[str],
    shapes: list[str],
    providers: list[str],
    modes: list[str] | None,
    repeats: int,
    failed: list[str] | None,
) -> Iterator[Row]:
    """Rows by the clock, the providers by turns: what disturbs the machine disturbs them alike."""
    copy = copy_bandwidth(device, repeats)
    for shape in shapes:
        # Else what was compiled for the shapes before counts against a limit.
        torch.compiler.reset()
        inputs = Inputs(SHAPES[shape], torch.bfloat16, device)
        for op in ops:
            for mode in [m for m in OPERATIONS[op].modes if not modes or m in modes]:
                works = {provider: prepare(op, provider, mode, inputs) for provider in providers}
                times = timed(list(works.values()), repeats)
                for (provider, work), seconds in zip(works.items(), times, strict=True):
                    wall, busy = zip(*seconds, strict=True)
                    row = _row((op, mode, provider, shape), work, wall, device, copy, least_bytes(op, mode, inputs))
                    yield row | {"cpu_ms": round(1e3 * _quantile(busy, 0.5), 4), "host_us": ""}


def _on_gpu(
    device: torch.device,
    ops: list[str],
    shapes: list[str],
    providers: list[str],
    modes: list[str] | None,
    repeats: int,
    failed: list[str] | None,
) -> Iterator[Row]:
    """Rows by replays of captured graphs, of one provider after the other."""
    with device_time.side_stream(device):
        copy = copy_bandwidth(device, repeats)
        for shape in shapes:
            torch.compiler.reset()
            sets = [Inputs(SHAPES[shape], torch.bfloat16, device)]
            for op in ops:
                for mode in [m for m in OPERATIONS[op].modes if not modes or m in modes]:
                    least = least_bytes(op, mode, sets[0])
                    while len(sets) < device_time.sets_for(least, device):
                        sets.append(Inputs(SHAPES[shape], torch.bfloat16, device))
                    for provider in providers:
                        names = op, mode, provider, shape
                        try:
                            works = [prepare(op, provider, mode, inputs) for inputs in sets]
                            seconds = device_time.device_times(works, repeats)
                            host = device_time.host_times(works[0])
                            row = _row(names, works[0], seconds, device, copy, least)
                        except Exception as error:
                            if failed is None:
                                raise
                            failed.append(f"{' '.join(names)} ({type(error).__name__}: {str(error).splitlines()[0]})")
                            continue
                        yield row | {"cpu_ms": "", "host_us": round(1e6 * _quantile(host, 0.5), 1)}
            del sets


def _row(
    names: tuple[str, ...],
    work: Callable[[], object],
    seconds: Sequence[float],
    device: torch.device,
    copy: float,
    least: int,
) -> Row:
    """A row from the times of a work that moves `least` bytes at least, beside a copy's bytes a second."""
    row: Row = dict(zip(KEY, (*names, "bfloat16"), strict=True))
    row |= {f"p{q}_ms": round(1e3 * _quantile(seconds, q / 100), 4) for q in (20, 50, 80)}
    rate = least / _quantile(seconds, 0.5)
    row |= {"gb_per_s": round(rate / 1e9, 4), "of_copy": round(rate / copy, 3)}
    row |= {"peak_mib": round(peak_bytes(work, device) / 2**20, 4), "launches": launches(work, device, names[2])}
    row |= {"repeats": len(seconds), "threads": torch.get_num_threads(), **_nvml(device)}
    return row | {"torch": torch.__version__, "commit": tables.revision()}


def timed(works: list[Callable[[], object]], repeats: int) -> list[list[Times]]:
    """Times on a CPU of each run of each work, after two to warm up, by turns."""
    for work in works * 2:
        work()
    times: list[list[Times]] = [[] for _ in works]
    for _ in range(repeats):
        for work, seconds in zip(works, times, strict=True):
            begin, busy = time.perf_counter(), time.process_time()
            work()
            seconds.append((time.perf_counter() - begin, time.process_time() - busy))
    return times


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written a second by a copy of 256 MiB, median."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    if device.type == "cuda":
        seconds = device_time.device_times([copy], repeats)
    else:
        (times,) = timed([copy], repeats)
        seconds = [wall for wall, _ in times]
    return 2 * COPY_BYTES / _quantile(seconds, 0.5)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory allocated during the work above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


# Operators that launch nothing: views, allocations, questions. A conversion that has nothing to convert is a leaf.
_FREE = {
    "view", "_unsafe_view", "as_strided", "alias", "detach", "expand", "expand_as", "reshape", "unsqueeze", "squeeze",
    "select", "slice", "t", "transpose", "permute", "flatten", "empty", "empty_like", "empty_strided", "new_empty",
    "result_type", "scalar_tensor", "resolve_conj", "resolve_neg",
}  # fmt: skip


def launches(work: Callable[[], object], device: torch.device, provider: str) -> int | str:
    """Kernels by the profiler. On a CPU, of eager PyTorch: the operators it would launch one by one on a GPU."""
    if device.type != "cuda" and provider != "eager":
        return ""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(map(_is_launch, profile.events() or ()))


def _is_launch(event: Any) -> bool:
    """Whether a profiled event is an operator that no other operator called, and that has work for a device."""
    space, _, name = event.name.partition("::")
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    idle = name in _FREE or (name == "to" and not event.cpu_children)
    return space == "aten" and parent is None and not idle


def _nvml(device: torch.device) -> Row:
    """SM clock, power and throttle reasons now, as a bit mask; empty on a CPU."""
    if device.type != "cuda":
        return {"clock_mhz": "", "power_w": "", "throttle": ""}
    require("pynvml", "bench kernels")
    now = Board(device).read()
    return {"clock_mhz": round(now.clock_mhz), "power_w": round(now.watts), "throttle": hex(now.reasons)}


def _quantile(times: Sequence[float], q: float) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(q))


def document() -> str:
    """docs/results.md with the rows of SHOWN between its marks: a line for each shape, operation and mode."""
    found = {tuple(row[k] for k in KEY): row for row in read(SHOWN)}
    head = ["shape", "operation"]
    for figure in ("CPU ms", "wall ms, median", "peak extra MiB"):
        head += [figure, "eager/ours"]
    lines = []
    for shape in SHAPES:
        for op, operation in OPERATIONS.items():
            for mode in operation.modes:
                rows = [found.get((op, mode, provider, shape, "bfloat16")) for provider in PROVIDERS]
                if rows[0] is None:
                    continue
                cells = [_beside(rows, column) for column in ("cpu_ms", "p50_ms", "peak_mib")]
                name = f"{op}, {mode}".replace("_", " ")
                lines.append((shape, name, *cells))
    return tables.between(DOCUMENT, MARKS, tables.markdown(head, lines))


def _beside(rows: list[Row | None], column: str) -> str:
    """One figure of all providers, and how many times ours eager's is."""
    values = [None if row is None else float(row[column]) for row in rows]
    shown = " / ".join("–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    ours, eager = values[:2]
    return f"{shown} | {'–' if not ours or eager is None else f'{eager / ours:.1f}×'}"


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the median time, a panel an operation and mode, grouped by shape."""
    require("matplotlib", "bench kernels")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if (row["op"], row["mode"]) == panel]
        shapes = list(dict.fromkeys(row["shape"] for row in chosen))
        for offset, provider in enumerate(PROVIDERS):
            bars = [(shapes.index(r["shape"]), float(r["p50_ms"])) for r in chosen if r["provider"] == provider]
            axis.bar([x + 0.27 * (offset - 1) for x, _ in bars], [t for _, t in bars], 0.25, label=provider)
        axis.set_xticks(range(len(shapes)), shapes)
        axis.set_title(" ".join(panel).replace("_", " "), fontsize=9)
        axis.set_yscale("log")
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    axes[0][0].set_ylabel("ms, median")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(base: str, ops: list[str] | None, shapes: list[str] | None, repeats: int) -> None:
    """Median times of our kernels as they are at a git ref beside those of this tree, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        tables.unpack("bench compare", base, ["kernels"], Path(folder))
        before = _measure_tree(Path(folder) / "kernels", ops, shapes, repeats)
    after = {tuple(row[k] for k in KEY): row for row in _measure_tree(ROOT / "kernels", ops, shapes, repeats)}
    columns, rows = ("op", "mode", "shape", "p50_at_base", "p50_here", "ratio"), []
    for row in before:
        here = after[tuple(row[k] for k in KEY)]
        times = {"p50_at_base": row["p50_ms"], "p50_here": here["p50_ms"]}
        rows.append({**row, **times, "ratio": f"{here['p50_ms'] / row['p50_ms']:.2f}"})
    tables.show(f"{device_slug()}: {base} → this tree, ms", rows, columns, columns[:3])


def _measure_tree(kernels: Path, ops: list[str] | None, shapes: list[str] | None, repeats: int) -> list[Row]:
    code = (
        "import json, sys; path, *chosen = json.loads(sys.argv[1]); sys.path.insert(0, path)\n"
        "import fastgrpo_kernels; assert fastgrpo_kernels.__file__.startswith(path), fastgrpo_kernels.__file__\n"
        "from fastgrpo.commands.bench import load\n"
        "ops, shapes, repeats = chosen\n"
        "print(json.dumps(list(load('kernels').measure(ops, shapes, ['ours'], None, repeats))))"
    )
    command = [sys.executable, "-c", code, json.dumps([str(kernels), ops, shapes, repeats])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench compare: {kernels}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
