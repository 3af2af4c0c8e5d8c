"""A run directory as `fastgrpo train` and `fastgrpo eval` leave it, of made-up numbers, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastgrpo.config import dump
from fastgrpo.observe.media import write_grid
from support.tiny import tiny_config

PROMPTS = ["a red circle", "two <blue> squares & a cross", 'a "green" triangle']


def make_run(
    run: Path, gain: float = 0.2, summary: bool = True, lr: float = 1e-5, values: bool = True, iterations: int = 40
) -> Path:
    """Writes a run of `iterations` of 40, with evaluations at 0, 20 and 40.

    gain: of the strict pass rate. summary: with a closing evaluation. values: evaluations keep those of each image.
    """
    (run / "eval").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(tiny_config(run, update={"optimizer": {"lr": lr}}, train={"iterations": 40})))
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(iterations):
            line = {"iteration": i, "reward/mean": 0.5 + gain * i / 40, "kl": 0.0, "grad_norm": None if i else 2.5}
            line |= {"ratio/max_deviation": 1e-5 * (1 + i), "ratio/first_max_deviation": 0.0, "clip_fraction": 0.1}
            line |= {"time/rollout": 0.3, "time/update": 0.6, "time/other": 0.1, "time/total": 1.0}
            line |= {"samples_per_second": 96.0, "memory/peak_bytes": 2.0**30}
            file.write(json.dumps(line) + "\n")
    records = {}
    for iteration in (0, 20, 40):
        write_grid(torch.full((3, 3, 16, 16), iteration / 40), run / "eval" / f"{iteration:06d}.png")
        strict = 0.5 + gain * iteration / 40
        records[iteration] = {
            "iteration": iteration,
            "images": 96,
            "rewards": {"shapes": strict + 0.1, "shapes.strict": strict},
            "strict_pass": strict,
            "by_category": {"two_object": {"shapes": strict + 0.1, "shapes.strict": strict}},
            "prompts": PROMPTS,
            "grid": f"{iteration:06d}.png",
            "values": {
                "shapes": [0.1, 0.2, 0.3],
                "shapes.strict": [float(iteration > 0), 1.0, float(iteration < 40)],
            },
        }
        if not values:
            del records[iteration]["values"]
        (run / "eval" / f"{iteration:06d}.json").write_text(json.dumps(records[iteration]))
    start = {
        "time": "2026-11-24T10:20:30.000+00:00",
        "event": "start",
        "iteration": 0,
        "ranks": 2,
        "commit": "abc123+",
    }
    start |= {"machine": "NVIDIA H100, x86_64, 16 cores, 8 threads", "versions": {"fastgrpo": "0.1.0"}}
    (run / "events.jsonl").write_text(json.dumps(start) + '\n{"cut')
    if summary:
        content = {"base": records[0], "tuned": records[40], "iteration": 40, "train_seconds": 40.0, "seed": 7}
        content["difference"] = {"shapes.strict": {"mean": gain, "interval95": [gain - 0.05, gain + 0.05]}}
        content["versions"] = {"fastgrpo": "0.1.0", "torch": "2.13.0"}
        (run / "summary.json").write_text(json.dumps(content))
    return run
