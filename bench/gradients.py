"""How much of an iteration's gradient is signal, by the step that is trained: the weights stay as they are.

python bench/gradients.py configs/shapes-flux.yaml 64 [key.sub=value …]    # a line for each step
python bench/gradients.py configs/shapes-flux.yaml 64 [key.sub=value …] -- [key.sub=value …]

With `--` each step's signal is also held against that of all steps by the settings after it: their cosine. Let the two
have seeds of their own (`run.seed`).
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import load_config
from fastgrpo.errors import ConfigError
from fastgrpo.rollout.generator import Batch
from fastgrpo.training.trainer import Trainer


def gradients(path: str, iterations: int, overrides: Sequence[str] = ()) -> dict[int, Tensor]:
    """Gradients [n, weights], float64, of a recipe's iterations at the same weights, by the step that each trains."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("eval.every=0", "checkpoint.every=0", "telemetry.progress=false", "callbacks=[]")
        config = load_config(path, [*overrides, f"run.dir={folder}/run", *quiet])
        if config.objective.forward:
            raise ConfigError(f"objective.kind: {config.objective.kind} trains no step of a trajectory; take grpo")
        trainer = Trainer.from_config(config)
        optimizer, run, trained = trainer.optimizer, trainer.updater.run, 0

        def running(batch: Batch, *rest: Any, **named: Any) -> Any:
            nonlocal trained
            (trained,) = np.unique(batch.trajectory.layout.row_step).tolist()
            return run(batch, *rest, **named)

        def kept() -> tuple[Tensor, Tensor]:
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimizer.parameters]
            found[trained].append(torch.cat([part.reshape(-1) for part in parts]))
            for p in optimizer.parameters:
                p.grad = None
            return found[trained][-1].norm(), torch.zeros(())

        trainer.updater.run, optimizer.step = running, kept
        for _ in range(iterations):
            trainer.step()
    return {step: torch.stack(found[step]).double() for step in sorted(found)}


def signal(samples: Tensor) -> tuple[float, float, float]:
    """Of independent gradients [n, weights]: their root mean square norm, the squared norm of what they are a noisy
    measurement of, without its bias (the mean product of two), and that one's standard error."""
    products = samples @ samples.T
    pairs = products[*torch.triu_indices(len(samples), len(samples), 1)]
    return float(products.diagonal().mean().sqrt()), float(pairs.mean()), float(pairs.std() / len(pairs) ** 0.5)


def cosine(samples: Tensor, reference: dict[int, Tensor]) -> float:
    """Of the signal in independent gradients [n, weights] with the sum of those of a reference's steps, which have
    noise of their own. Noise lengthens neither: squared norms are without its bias."""
    means = [one.mean(0) for one in reference.values()]
    whole = torch.stack(means).sum(0)
    # What noise adds to the squared norm of a mean.
    excess = sum(float(m @ m) - signal(one)[1] for m, one in zip(means, reference.values(), strict=True))
    lengths = max(signal(samples)[1], 0.0) * max(float(whole @ whole) - excess, 0.0)
    return float(samples.mean(0) @ whole) / lengths**0.5 if lengths else float("nan")


if __name__ == "__main__":
    path, iterations, *settings = sys.argv[1:]
    cut = settings.index("--") if "--" in settings else len(settings)
    by_step = gradients(path, int(iterations), settings[:cut])
    reference = gradients(path, int(iterations), settings[cut + 1 :]) if cut < len(settings) else None
    for step, samples in by_step.items():
        norm, squared, error = signal(samples)
        noise = norm**2 - squared
        beside = "" if reference is None else f", cosine {cosine(samples, reference):.2f}"
        print(
            f"step {step}, {len(samples)} iterations: norm {norm:.2e}, signal² {squared:.2e} ± {error:.1e}, "
            f"signal² / noise² {squared / noise:.3f}{beside}"
        )
