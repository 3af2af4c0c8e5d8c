"""An iteration of a config beside the sequential baseline: DanceGRPO's loop (arXiv 2505.07818) as a recipe of ours.

Batch 1 everywhere, one sample × one step a backward pass and one reduction each, every rollout at its whole depth,
float32 weights gathered, old log-probabilities subtracted; every block recomputed, as its script always does
(`sequential`), and nothing recomputed (`uncheckpointed`), which a small model does not need.

fastgrpo bench train configs/shapes-flux-dance.yaml --compare sequential --json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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


# The settings of each side, by name.
SIDES = {
    "ours": (),
    "sequential": BASELINE,
    "uncheckpointed": (*BASELINE, "model.activation_checkpointing=none"),
}


class Bench:
    """A trainer that iterates when asked, in a run directory of its own."""

    def __init__(self, config: Config, *load: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.trainer = Trainer.from_config(config, *load)
        self.trainer.timer.clock = clock
        self.seconds: list[float] = []
        # Of all threads of this process: what other jobs on the machine do not change much.
        self.processor: list[float] = []

    def iterate(self) -> None:
        begin, used = time.perf_counter(), time.process_time()
        self.trainer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.processor.append(time.process_time() - used)

    def metrics(self, warm_up: int) -> list[dict[str, float]]:
        """Those of each iteration after the warm-up."""
        self.trainer.flush()
        return read_metrics(self.trainer.config.run.dir)[warm_up:]

    def result(self, warm_up: int) -> dict[str, Any]:
        """Medians over the iterations after the warm-up."""
        lines = self.metrics(warm_up)
        phases = sorted(name for name in lines[0] if name.startswith("time/"))
        medians = {name.removeprefix("time/"): statistics.median(line[name] for line in lines) for name in phases}
        seconds, processor = (statistics.median(spent[warm_up:]) for spent in (self.seconds, self.processor))
        return {"seconds": seconds, "processor_seconds": processor, "phases": medians}


def in_turns(
    path: Path, overrides: Sequence[str], sides: Mapping[str, Sequence[str]], iterations: int, warm_up: int = 1
) -> dict[str, Any]:
    """`Bench.result` of a config with the settings of each side, whose iterations take turns."""
    with tempfile.TemporaryDirectory() as folder:
        benches = {}
        for name, settings in sides.items():
            quiet = ("telemetry.progress=false", "eval.every=0", "checkpoint.every=0", f"run.dir={folder}/{name}")
            benches[name] = Bench(load_config(path, [*overrides, *settings, *quiet]))
        for _ in range(warm_up + iterations):
            for bench in benches.values():
                bench.iterate()
        return {name: bench.result(warm_up) for name, bench in benches.items()}


def compare(path: Path, overrides: list[str], iterations: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds of an iteration of the config and of its sequential baselines, taken in turns in one process."""
    results = in_turns(path, overrides, SIDES, iterations, warm_up)
    return {
        "config": str(path),
        "overrides": overrides,
        "baseline": list(BASELINE),
        "iterations": iterations,
        **results,
        "speedup": results["sequential"]["seconds"] / results["ours"]["seconds"],
        "speedup_uncheckpointed": results["uncheckpointed"]["seconds"] / results["ours"]["seconds"],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each phase, and how many times ours a side takes."""
    phases = [name for name in result["ours"]["phases"] if name != "total"]
    lines = ["".join([f"{'seconds an iteration':<22}", *(f"{name:>16}" for name in SIDES)])]
    for name in phases:
        lines.append("".join([f"{name:<22}", *(f"{result[side]['phases'][name]:16.3f}" for side in SIDES)]))
    for name, column in (("iteration", "seconds"), ("processor time", "processor_seconds")):
        ours = result["ours"][column]
        lines.append("".join([f"{name:<22}", *(f"{result[side][column]:16.3f}" for side in SIDES)]))
        lines.append("".join([f"{'times ours':<22}", *(f"{result[side][column] / ours:16.1f}" for side in SIDES)]))
    return "\n".join(lines)
