"""Short runs with one thing broken each, and runs that learn: what `fastgrpo doctor RUN` is calibrated on.

python bench/doctor_runs.py OUT [case …]    # minutes; then OUT/<case>.json is what tests/commands/doctor_runs keeps
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastgrpo
from fastgrpo.commands.report.run_data import RunData, read_run
from fastgrpo.config import load_config
from fastgrpo.data.prompts import Prompt
from fastgrpo.models.families.flux import Flux
from fastgrpo.rewards import Scores

FLUX = "configs/shapes-flux.yaml"
# Seconds of a core: enough for what is broken to show, too few to learn much where nothing is.
SHORT = (
    "rollout.prompts_per_iteration=8", "rollout.suffix_steps=2", "update.optimizer.schedule=constant",
    "update.optimizer.lr=4e-4", "update.ema_decay=0.9", "train.iterations=16", "eval.every=16", "eval.images=120",
    "eval.grid=1", "checkpoint.every=0", "telemetry.progress=false", "callbacks=[]",
)  # fmt: skip
HERE = "bench.doctor_runs"


class Noisy:
    """The verifier's score and three times its own spread of noise."""

    def __init__(self) -> None:
        from fastgrpo.rewards.shapes import ShapesReward

        self.inner, self.rng = ShapesReward(), np.random.default_rng(0)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        found = self.inner.score(samples, prompts, fps)
        return Scores(found.values + self.rng.normal(0, 1.0, len(found.values)), found.valid)


class Flaky(Noisy):
    """The verifier's score of every other sample."""

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        found = self.inner.score(samples, prompts, fps)
        return Scores(found.values, found.valid & (self.rng.random(len(prompts)) < 0.6))


class Bright:
    """The mean of all pixels, which has nothing to do with the prompt."""

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        values = samples.float().flatten(1).mean(1).double().numpy()
        return Scores(values, np.ones(len(values), dtype=bool))


def strict(threshold: float) -> str:
    return f"rewards=[{{name: binary, options: {{of: {{name: shapes}}, threshold: {threshold}}}}}]"


# What is broken, by the finding that names it; "": nothing is.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "one-prompt": ("few_prompts", FLUX, ("rollout.prompts_per_iteration=1", "rollout.forward_batch=8")),
    "flat-groups": ("flat_groups", FLUX, (strict(0.02),)),
    "own-noise": ("untrained_spread", FLUX, ("rollout.shared_noise=false",)),
    "ratio-not-1": ("ratio", FLUX, ()),
    "rate-too-high": ("rate_high", FLUX, ("update.optimizer.lr=1e-2",)),
    "rate-too-low": ("rate_low", FLUX, ("update.optimizer.lr=2e-6",)),
    "average-too-early": ("ema", FLUX, ("update.ema_decay=0.9999", "update.ema_warmup=false")),
    "noisy-reward": ("reward_noise", FLUX, (f"rewards=[{{name: '{HERE}:Noisy', label: noisy}}]",)),
    "another-judge": (
        "judges", FLUX, (f"rewards=[{{name: '{HERE}:Bright', label: bright}}, {{name: shapes, weight: 0}}]",),
    ),
    "guidance": (
        "guidance", "configs/shapes-stable-diffusion.yaml",
        ("model.guidance=3", "update.optimizer.lr=2e-4", "rollout.suffix_steps=null"),
    ),
    "too-much-noise": ("eta_high", FLUX, ("rollout.eta=4",)),
    "too-little-noise": ("eta_low", FLUX, ("rollout.eta=0.03",)),
    "held-back": ("kl", FLUX, ("objective.kl_weight=1e4",)),
    "all-clipped": ("clip", FLUX, ("update.optimizer_steps=8", "objective.clip_low=1e-8", "objective.clip_high=1e-8")),
    "reward-fails": ("failed", FLUX, (f"rewards=[{{name: '{HERE}:Flaky', label: flaky}}]",)),
    # Meant to break nothing, and it falls: 64 samples an update are too few for the rate of SHORT.
    "few-samples": ("rate_high", FLUX, ()),
}  # fmt: skip
# Runs that learn: the demo, its recipes of before, other rates (faster-0 is recorded up to iteration 80), and words.
HOTTER = ("update.optimizer.lr=3e-4", "update.ema_decay=0.96")
FASTER = ("train.iterations=180", "update.optimizer.lr=4e-4", "update.ema_decay=0.96")
BEFORE = (
    "train.iterations=320", "rollout.suffix_steps=null", "update.ema_decay=0.98", "eval.every=80", "eval.images=120",
)  # fmt: skip
AWM = (
    "rollout.shared_noise=false", "rollout.suffix_steps=null", "objective.kind=awm", "objective.clip_low=1",
    "objective.clip_high=1", "objective.times={count: 1, draw: uniform}", "objective.old_weight=1",
    "update.optimizer_steps=2", "update.optimizer.lr=1e-4", "train.iterations=64", "eval.every=16",
)  # fmt: skip
LEARNS: dict[str, tuple[str, ...]] = {
    **{f"demo-{seed}": (f"run.seed={seed}",) for seed in range(3)},
    **{f"hotter-{seed}": (f"run.seed={seed}", *HOTTER) for seed in range(3)},
    **{f"before-{seed}": (f"run.seed={seed}", *BEFORE) for seed in range(2)},
    **{f"faster-{seed}": (f"run.seed={seed}", *FASTER) for seed in range(2)},
    "awm-2": ("run.seed=2", *AWM),
    **{f"words-{seed}": (f"run.seed={seed}",) for seed in range(3)},
}


def make(case: str, out: Path) -> dict[str, Any]:
    """Trains a case, if it has not been, and returns its record."""
    learns = "configs/shapes-words-flux.yaml" if case.startswith("words") else FLUX
    _, path, overrides = CASES[case] if case in CASES else ("", learns, LEARNS[case])
    settings = (*SHORT, *overrides) if case in CASES else overrides
    config = load_config(path, [*settings, f"run.dir={out / case}", "run.resume=auto"])
    predict = Flux.predict
    if case == "ratio-not-1":
        # What rollout and update disagree by where a model behaves otherwise with gradients.
        @functools.wraps(predict)
        def disagreeing(*args: Any, **kwargs: Any) -> torch.Tensor:
            return predict(*args, **kwargs) * (1 + 3e-2 * torch.is_grad_enabled())

        Flux.predict = disagreeing
    try:
        fastgrpo.train(config)
    finally:
        Flux.predict = predict
    return trimmed(read_run(out / case))


# What the findings read of a run's metrics.
KEPT = (
    "iteration", "reward/mean", "reward/std", "samples/failed", "groups/zero_spread", "ratio/first_max_deviation",
    "clip_fraction", "kl", "optimizer_steps/skipped",
)  # fmt: skip


def trimmed(run: RunData) -> dict[str, Any]:
    """Of a run, what the findings read, in four digits."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    columns = [spec.key for spec in run.rewards]
    return {
        "config": run.config | {"run": run.config["run"] | {"dir": f"runs/{run.name}"}},
        "metrics": [{key: short(line[key]) for key in KEPT if key in line} for line in run.metrics],
        "evaluations": [
            {
                "iteration": evaluation["iteration"],
                "values": {name: [short(v) for v in evaluation["values"][name]] for name in columns},
            }
            for evaluation in run.evaluations
        ],
    }


def main(out: Path, cases: list[str]) -> None:
    for case in cases or [*CASES, *LEARNS]:
        path = out / f"{case}.json"
        if not path.exists():
            path.write_text(json.dumps(make(case, out), separators=(",", ":")) + "\n")
            print(case, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
