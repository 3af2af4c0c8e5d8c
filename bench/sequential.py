"""An iteration of a config beside the sequential baseline: DanceGRPO's loop (arXiv 2505.07818) as a recipe of ours.

Batch 1 everywhere, one sample × one step a backward pass and one reduction each, every rollout at its whole depth,
float32 weights gathered, every block recomputed, old log-probabilities subtracted.

fastgrpo bench train configs/shapes-flux-dance.yaml --compare sequential --json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, load_config
from fastgrpo.observe.run_log import read_metrics
from fastgrpo.training.trainer import Trainer

BASELINE = (
    "rollout.forward_batch=1",
    "rollout.decode_batch=1",
    "rollout.share_prefix=false",
    "rollout.old_values=log_prob",
    "model.dtype=float32",
    "model.activation_checkpointing=all",
    "update.grad_sync=per_micro_batch",
)


class Bench:
    """A trainer that iterates when asked, in a run directory of its own."""

    def __init__(self, config: Config, *load: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.trainer = Trainer.from_config(config, *load)
        self.trainer.timer.clock = clock
        self.seconds: list[float] = []

    def iterate(self) -> None:
        begin = time.perf_counter()
        self.trainer.step()
        self.seconds.append(time.perf_counter() - begin)

    def metrics(self, warm_up: int) -> list[dict[str, float]]:
        """Those of each iteration after the warm-up."""
        self.trainer.flush()
        return read_metrics(self.trainer.log.directory)[warm_up:]

    def result(self, warm_up: int) -> dict[str, Any]:
        """Medians over the iterations after the warm-up."""
        lines = self.metrics(warm_up)
        phases = sorted(name for name in lines[0] if name.startswith("time/"))
        medians = {name.removeprefix("time/"): statistics.median(line[name] for line in lines) for name in phases}
        return {"seconds": statistics.median(self.seconds[warm_up:]), "phases": medians}


def compare(path: Path, overrides: list[str], iterations: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds of an iteration of the config and of its sequential baseline, taken in turns in one process."""
    with tempfile.TemporaryDirectory() as folder:
        benches = []
        for name, settings in (("ours", ()), ("sequential", BASELINE)):
            quiet = ("telemetry.progress=false", "eval.every=0", "checkpoint.every=0", f"run.dir={folder}/{name}")
            benches.append(Bench(load_config(path, [*overrides, *settings, *quiet])))
        for _ in range(warm_up + iterations):
            for bench in benches:
                bench.iterate()
        ours, sequential = (bench.result(warm_up) for bench in benches)
    return {
        "config": str(path),
        "overrides": overrides,
        "baseline": list(BASELINE),
        "iterations": iterations,
        "ours": ours,
        "sequential": sequential,
        "speedup": sequential["seconds"] / ours["seconds"],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each phase."""
    ours, theirs = result["ours"], result["sequential"]
    lines = [f"{'seconds an iteration':<22} {'ours':>9} {'sequential':>11} {'times':>7}"]
    rows = [(name, ours["phases"][name], theirs["phases"][name]) for name in ours["phases"] if name != "total"]
    for name, mine, other in [*rows, ("iteration", ours["seconds"], theirs["seconds"])]:
        lines.append(f"{name:<22} {mine:9.3f} {other:11.3f} {other / max(mine, 1e-9):7.1f}")
    return "\n".join(lines)
