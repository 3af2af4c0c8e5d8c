"""One command for whoever has GPUs and the weights: the base's score, the score after some iterations, seconds by
phase, model FLOP utilization, and a row to contribute. `make real-run-check`; docs/first-real-run.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrpo.config import Config, load_config
from fastgrpo.errors import UserError
from fastgrpo.planning.gpus import GPUS, Gpu
from fastgrpo.planning.plan import plan

PHASES = ("conditioning", "rollout", "decode", "reward", "sync", "update", "other")
# Stable Diffusion 1.4 as DanceGRPO's project page has it: HPS-v2.1 of the base, at iteration 100 of its best-of-N plot
# (16 of 16), and after its whole run with HPS-v2.1 alone.
PUBLISHED = {"base": 0.239, "iteration 100": 0.315, "whole run": 0.365}


def device() -> tuple[str, Gpu | None]:
    """The first GPU's name, and what a plan knows of its kind; `cpu` without one."""
    if not torch.cuda.is_available():
        return "cpu", None
    name = torch.cuda.get_device_name(0)
    return name, next((gpu for kind, gpu in GPUS.items() if kind.split("-")[0] in name.lower()), None)


def phase_seconds(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median seconds of each phase over a run's iterations but the first, which warms up."""
    counted = lines[1:] or lines
    return {name: float(np.median([line.get(f"time/{name}", 0.0) for line in counted])) for name in PHASES}


def utilization(config: Config, gpu: Gpu, gpus: int, seconds: Mapping[str, float]) -> float:
    """The share of the GPU's peak that an iteration's rollout, decoding and update reach: the FLOPs of its plan over
    their measured seconds."""
    flops = sum(phase.cost.flops for phase in plan(config, gpu, gpus).run.phases)
    peak = gpu.float32 if config.model.dtype == "float32" else gpu.bfloat16
    return flops / sum(seconds[name] for name in ("rollout", "decode", "update")) / peak


def measured(
    config: Config,
    recipe: Path,
    images: int,
    gpus: int,
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """What the run says: scores of the first reward before and after, seconds by phase, utilization."""
    reward, (name, gpu) = config.scored[0].key, device()
    seconds = phase_seconds(lines)
    return {
        "recipe": recipe.stem, "device": name, "gpus": gpus, "torch": torch.__version__,
        "iterations": len(lines), "images": images, "reward": reward,
        "base": summary["base"]["rewards"][reward], "tuned": summary["tuned"]["rewards"][reward],
        "seconds": seconds, "iteration_seconds": sum(seconds.values()),
        "utilization": None if gpu is None else utilization(config, gpu, gpus, seconds),
    }  # fmt: skip


def as_row(found: Mapping[str, Any]) -> str:
    """A line of the table of docs/first-real-run.md."""
    share = "–" if found["utilization"] is None else f"{found['utilization']:.0%}"
    phases = ", ".join(f"{name} {value:.2f}" for name, value in found["seconds"].items() if value >= 0.005)
    return (
        f"| {found['recipe']} | {found['gpus']} × {found['device']} | {found['iterations']} "
        f"| {found['base']:.3f} | {found['tuned']:.3f} | {found['iteration_seconds']:.1f} ({phases}) | {share} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/sd-parity-8xh100.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--run", type=Path, default=Path("runs/real-run-check"))
    given = parser.parse_intermixed_args(arguments)
    settings = [*given.overrides, f"run.dir={given.run}", f"train.iterations={given.iterations}", "run.resume=auto"]
    call([sys.executable, "-m", "fastgrpo", "assets", str(given.config), *given.overrides])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.gpus}"]
    call([*launch, "-m", "fastgrpo", "train", str(given.config), *settings])
    call([sys.executable, "-m", "fastgrpo", "eval", str(given.run), "--images", str(given.images)])
    config = load_config(given.config, settings)
    lines = [json.loads(line) for line in (given.run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((given.run / "summary.json").read_text())
    found = measured(config, given.config, given.images, given.gpus, lines, summary)
    (given.run / "real-run.json").write_text(json.dumps(found, indent=1))
    print(as_row(found))
    if config.model.path == "CompVis/stable-diffusion-v1-4":
        print("published by DanceGRPO, HPS-v2.1: " + ", ".join(f"{k} {v:.3f}" for k, v in PUBLISHED.items()))
    print(f"written: {given.run / 'real-run.json'}")


def call(command: list[str]) -> None:
    """Runs a command; ends this one with its exit code where it fails."""
    print("$", *command[1:], file=sys.stderr, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
