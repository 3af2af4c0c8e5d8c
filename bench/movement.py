"""How far an update moves the policy: Q of its rows after the optimizer steps, which is 0 before them.

python bench/movement.py configs/shapes-flux.yaml 11 [key.sub=value …]    # a line an iteration, then their mean
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastgrpo.config import load_config
from fastgrpo.errors import ConfigError
from fastgrpo.models.conditioning import to_device
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.sampler import forward_batches
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import Updater

# AdamW's first steps move every weight by the whole learning rate: they say little of the later ones.
FIRST = 3


@torch.no_grad()
def movement(updater: Updater, batch: Batch) -> float:
    """Returns the mean of Q = mean((b·(v − v_old)/s)²) over a batch's rows, with the weights as they are."""
    family, trajectory, layout = updater.family, batch.trajectory, batch.trajectory.layout
    coefficients = np.array(batch.schedule.transitions, dtype=np.float64)[layout.row_step]
    times = np.array(batch.schedule.times, dtype=np.float32)[layout.row_step]
    found = []
    for name in dict.fromkeys(batch.schedule.modules):
        acts = np.array([module == name for module in batch.schedule.modules])[layout.row_step]
        for rows, real in forward_batches(np.flatnonzero(acts), updater.config.rollout.forward_batch):
            index = to_device(rows, family.device)
            v = family.predict(
                trajectory.x.index_select(0, index), to_device(times[rows], family.device),
                batch.conditioning.rows(layout.row_prompt[rows]), family.modules[name],
            )  # fmt: skip
            apart = (v.double() - trajectory.v_old.index_select(0, index).double()).square().flatten(1).mean(1)
            scale = (coefficients[rows, 1] / coefficients[rows, 2]) ** 2
            found.append((apart.cpu().numpy() * scale)[:real])
    return float(np.concatenate(found).mean())


def measure(path: str, iterations: int, overrides: Sequence[str] = ()) -> list[float]:
    """Q after each of the first iterations of a recipe, at its peak learning rate, a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("eval.every=0", "checkpoint.every=0", "telemetry.progress=false", "callbacks=[]")
        constant = ("update.optimizer.schedule=constant", f"run.dir={folder}/run")
        config = load_config(path, [*overrides, *constant, *quiet])
        if config.objective.forward:
            raise ConfigError(f"objective.kind: {config.objective.kind} trains no step of a trajectory; take grpo")
        trainer = Trainer.from_config(config)
        run, found = trainer.updater.run, []

        def moved(batch: Batch, *rest: Any, **named: Any) -> Any:
            result = run(batch, *rest, **named)
            found.append(movement(trainer.updater, batch))
            steps = np.unique(batch.trajectory.layout.row_step).tolist()
            print(f"{len(found):4} step {' '.join(map(str, steps))}: Q {found[-1]:.3g}", flush=True)
            return result

        trainer.updater.run = moved
        for _ in range(iterations):
            trainer.step()
    return found


if __name__ == "__main__":
    movements = measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    print(f"mean of Q from iteration {FIRST + 1} on: {np.mean(movements[FIRST:]):.3g}")
