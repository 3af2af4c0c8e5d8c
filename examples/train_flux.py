"""Trains the embedded FLUX from Python, step by step; plots the reward, and samples before and after.

python examples/train_flux.py --iterations 40 --out runs/example    (some minutes on two cores)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import fastgrpo
from fastgrpo.distributed.world import World
from fastgrpo.evaluation.heldout import draw, heldout_prompts
from fastgrpo.observe.media import write_grid

RECIPE = Path(__file__).parents[1] / "configs" / "shapes-flux.yaml"


def main(iterations: int, out: Path, overrides: list[str]) -> list[float]:
    """Returns the mean reward of each iteration."""
    config = fastgrpo.load_config(RECIPE, [f"train.iterations={iterations}", f"run.dir={out}", *overrides])
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    family = fastgrpo.load_family(config.model, world.device)
    # Nothing is written by a trainer that is made from its parts: what happens to metrics is up to you.
    trainer = fastgrpo.Trainer(config, family, world)
    prompts = heldout_prompts(config, 8)
    out.mkdir(parents=True, exist_ok=True)
    write_grid(draw(family, prompts, config, world), out / "before.png")

    rewards = []
    for _ in range(iterations):
        metrics = trainer.step()
        rewards.append(metrics["reward/mean"])
        off = metrics["ratio/first_max_deviation"]
        print(f"iteration {trainer.iteration}: reward {rewards[-1]:.3f}, first ratio off by {off:.1g}")

    with trainer.optimizer.averaged():
        write_grid(draw(family, prompts, config, world), out / "after.png")
    plt.plot(rewards)
    plt.xlabel("iteration")
    plt.ylabel("mean reward")
    plt.savefig(out / "reward.png")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Settings, such as run.seed=1.")
    given = parser.parse_args()
    main(given.iterations, given.out, given.overrides)
