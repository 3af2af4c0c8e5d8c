"""Whole iterations of every family's recipe on this device: samples/s, seconds by phase, FLOPs, memory, energy.

fastgrpo bench train [--model flux] [--size tiny] [--sweep steps] [--compare sequential] [--base main]
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.config.dtypes import DTYPES
from fastgrpo.config.yaml import parse_yaml
from fastgrpo.errors import UserError
from fastgrpo.planning.gpus import GPUS
from fastgrpo.planning.meter import flops_of
from fastgrpo.planning.plan import overridden

from . import tables
from .sequential import BASELINE, Bench
from .tables import ROOT, Row
from .train_cases import BUILT, MODELS, SIZES, SWEEPS, Point, build_tiny, case_config, points, shape_of

PHASES = ("conditioning", "rollout", "decode", "reward", "sync", "update", "other")
KEY = ("model", "size", "point", "shape", "torch", "diffusers", "commit")
COLUMNS = (
    *KEY, "date", "samples_per_s", "iteration_s", *(f"{phase}_s" for phase in PHASES), "tflop", "peak_tflops",
    "peak_by", "mfu", "peak_mib", "joules_per_sample", "sequential_s", "speedup", "iterations", "threads", "clock",
)  # fmt: skip
# What a terminal has room for.
SHOWN = ("model", "size", "point", "samples_per_s", "iteration_s", "mfu", "peak_mib", "joules_per_sample", "speedup")
# One iteration whose FLOPs are counted, and one as those that are timed.
WARM_UP = 2


def run(
    models: list[str] | None, size: str, sweeps: list[str] | None, overrides: list[str], iterations: int,
    sequential: bool, write: bool,
) -> list[Row]:  # fmt: skip
    """Measures, each point in a fresh process, and puts rows and plot of this device into bench/data, and the page.

    Raises UserError where a point could not be measured, after the others.
    """
    rows, failed = [], []
    table = tables.DATA / f"train-{tables.device_slug()}.csv"
    for model, point in chosen(models, size, sweeps, overrides):
        try:
            row = in_process(ROOT, model, size, point, iterations, sequential)
        except UserError as error:
            print(f"{model} {point.name}: {error}", file=sys.stderr, flush=True)
            failed.append(f"{model} {point.name}")
            continue
        _tell(row)
        rows.append(row)
        if write:
            # At once: a long suite that is ended keeps what it has.
            tables.upsert(table, [row], KEY, COLUMNS)
    if write and rows:
        from . import train_page

        train_page.write(table)
    if failed:
        raise UserError(f"bench train: not measured: {', '.join(failed)}; see above")
    return rows


def compare(
    base: str, models: list[str] | None, size: str, sweeps: list[str] | None, overrides: list[str], iterations: int
) -> list[Row]:
    """Iterations by the code of a git ref beside those of this tree: the same recipes, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tables.unpack("bench train", base, ["fastgrpo", "kernels"], Path(folder))
        for model, point in chosen(models, size, sweeps, overrides):
            before, here = (in_process(tree, model, size, point, iterations, False) for tree in (Path(folder), ROOT))
            times = {"base_s": before["iteration_s"], "here_s": here["iteration_s"]}
            ratio = {"ratio": round(here["iteration_s"] / before["iteration_s"], 3)}
            memory = {"base_mib": before["peak_mib"], "here_mib": here["peak_mib"]}
            rows.append({"model": model, "size": size, "point": point.name, **times, **ratio, **memory})
    return rows


def chosen(
    models: list[str] | None, size: str, sweeps: list[str] | None, overrides: list[str]
) -> Iterator[tuple[str, Point]]:
    """The points that were asked for, names checked before the first. Raises UserError."""
    tables.chosen("bench train", "size", [size], SIZES)
    names = tables.chosen("bench train", "model", models, MODELS)
    named = tables.chosen("bench train", "sweep", sweeps, SWEEPS) if sweeps else []
    if size == "real" and not torch.cuda.is_available():
        raise UserError("bench train: --size real needs a CUDA GPU: billions of weights on a CPU would measure nothing")
    settings = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"bench train: '{item}' is not KEY=VALUE; a config alone is compared with its baseline")
        settings[key] = parse_yaml(value, key)
    suffix = "".join(f" {item}" for item in overrides)
    return (
        (model, Point(point.name + suffix, point.settings | settings))
        for model in names
        for point in points(model, size, named)
    )


def in_process(tree: Path, model: str, size: str, point: Point, iterations: int, sequential: bool) -> Row:
    """`measure` in a process of its own with the fastgrpo of a tree: memory and compiled code begin anew."""
    code = (
        "import json, sys; tree, folder, rest = json.loads(sys.argv[1]); sys.path[:0] = [tree, f'{tree}/kernels']\n"
        "import pathlib, fastgrpo; assert fastgrpo.__file__.startswith(tree), fastgrpo.__file__\n"
        "from fastgrpo.commands import bench as bench_cli; bench_cli.FOLDER = pathlib.Path(folder)\n"
        "print(json.dumps(bench_cli.load('train').measure(*rest)))"
    )
    rest = [model, size, vars(point), iterations, sequential]
    command = [sys.executable, "-c", code, json.dumps([str(tree), str(ROOT / "bench"), rest])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        raise UserError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, size: str, point: dict[str, Any], iterations: int, sequential: bool) -> Row:
    """The row of one point, by this process: medians over `iterations`, after WARM_UP that are not timed."""
    import diffusers

    at = Point(**point)
    load = ()
    if size == "real":
        from .real_size import random_family

        load = (random_family,)
    with tempfile.TemporaryDirectory() as folder:
        config = case_config(model, size, at.settings, Path(folder))
        if size == "tiny" and model in BUILT:
            build_tiny(model).save_pretrained(config.model.path)
        clock = clock_of_this_device()
        bench = Bench(config, *load, clock=clock)
        with ModelFlops() as counted:
            bench.iterate()
        for _ in range(WARM_UP - 1 + iterations):
            bench.iterate()
        lines = bench.metrics(WARM_UP)
        device = bench.trainer.world.device
        peak, peak_by = peak_flops(device, DTYPES[config.model.dtype], clock)
        row = _row(lines, bench.trainer.rollouts.samples, counted.flops, peak)
        if sequential:
            del bench
            pairs = (item.split("=", 1) for item in (*BASELINE, f"run.dir={folder}/sequential"))
            plain = overridden(config, {key: parse_yaml(value, key) for key, value in pairs})
            other = Bench(plain, *load, clock=clock)
            for _ in range(1 + iterations):
                other.iterate()
            seconds = statistics.median(line["time/total"] for line in other.metrics(1))
            row |= {"sequential_s": _short(seconds), "speedup": round(seconds / row["iteration_s"], 2)}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "commit": tables.revision()}
    about = {"model": model, "size": size, "point": at.name, "shape": shape_of(config), **versions}
    measured = {
        "peak_by": peak_by,
        "clock": "process" if clock is time.process_time else "wall",
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "iterations": iterations,
    }
    return dict.fromkeys(COLUMNS, "") | about | row | measured | {"threads": torch.get_num_threads()}


def _row(lines: list[dict[str, float]], samples: int, flops: int, peak: float) -> Row:
    """The figures of the timed iterations' metrics; FLOPs are of one iteration, peak is a device's a second."""

    def median(name: str) -> float:
        return statistics.median(line.get(name, math.nan) for line in lines)

    if any(line["samples/trained"] != samples for line in lines):
        raise UserError("bench train: not every sample was trained, so iterations did not cost the same")
    seconds = median("time/total")
    memory = max(value for line in lines for name, value in line.items() if name.startswith("memory/"))
    joules = median("gpu/joules_per_sample")
    return {
        "samples_per_s": _short(samples / seconds),
        "iteration_s": _short(seconds),
        **{f"{phase}_s": _short(median(f"time/{phase}")) for phase in PHASES},
        "tflop": _short(flops / 1e12),
        "peak_tflops": _short(peak / 1e12),
        "mfu": round(flops / seconds / peak, 4),
        "peak_mib": round(memory / 2**20),
        "joules_per_sample": "" if math.isnan(joules) else _short(joules),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class ModelFlops(TorchDispatchMode):
    """Counts FLOPs of matrix products, convolutions and attention while it is entered: those of the model, so not what
    a checkpointed block computes a second time, in its backward."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            # Its own operations on the local shards come here.
            return NotImplemented
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        recomputed = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if not recomputed:
            self.flops += flops_of(func, args, kwargs, output)
        return output


def clock_of_this_device() -> Callable[[], float]:
    """Of one thread of a CPU the process's own time, which leaves out what others make it wait; else the wall's."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def peak_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> tuple[float, str]:
    """FLOP/s of a device, and who says so: `vendor` of a GPU in planning/gpus.py, else `matmul`, the best of
    thirty matrix products."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
        known = next((gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in words), None)
        if known is not None and "pcie" not in words:
            return (known.bfloat16 if dtype == torch.bfloat16 else known.float32), "vendor"
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(30):
        begin = clock()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - begin)
    return 2 * side**3 / best, "matmul"


def tell(rows: list[Row], as_json: bool) -> None:
    """Prints rows, of a device or of two git refs, as JSON or as a table without what is empty."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    known = SHOWN if "iteration_s" in rows[0] else rows[0]
    shown = [c for c in known if any(row[c] != "" for row in rows)]
    tables.show(tables.device_name(), rows, shown, KEY[:3])


def _tell(row: Row) -> None:
    text = f"{row['model']} {row['size']} {row['point']}: {row['samples_per_s']:g} samples/s, {row['iteration_s']:g} s"
    print(f"{text} an iteration, MFU {row['mfu']:.1%}, {row['peak_mib']} MiB", file=sys.stderr, flush=True)
