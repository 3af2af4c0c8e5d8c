"""What batching, a window of trained steps and a shared prefix each save of an iteration of Flow-GRPO's recipe.

python bench/flow_grpo.py ITERATIONS [key.sub=value …]    # of the embedded FLUX, in turns; median processor seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.commands.bench import load

# arXiv 2505.05470: its sampler and noise level; samples of a group are divided by their deviation.
RECIPE = (
    "rollout.sampler=flow_sde", "rollout.eta=0.7", "rollout.steps=6", "rollout.suffix_steps=null",
    "advantage.normalize=std", "rollout.prompts_per_iteration=16", "callbacks=[]",
)  # fmt: skip
EVERY_STEP, ONE_STEP = (
    "rollout.trained={kind: subset, fraction: 1.0}",
    "rollout.trained={kind: window, size: 1, move: random, every: 1}",
)
OWN_NOISE = "rollout.shared_noise=false"


def batches(rows: int) -> tuple[str, str]:
    return f"rollout.forward_batch={rows}", f"rollout.decode_batch={rows}"


# What it does, at the batch of its FLUX script; then one thing after the other.
SIDES = {
    "batch-3": (EVERY_STEP, OWN_NOISE, *batches(3)),
    "batch-16": (EVERY_STEP, OWN_NOISE, *batches(16)),
    "window": (ONE_STEP, OWN_NOISE, *batches(16)),
    "prefix": (ONE_STEP, *batches(16)),
}


def main(iterations: int, overrides: Sequence[str]) -> None:
    path = Path(__file__).parents[1] / "configs" / "shapes-flux.yaml"
    found = load("sequential").in_turns(path, [*RECIPE, *overrides], SIDES, iterations)
    first = found["batch-3"]["processor_seconds"]
    for name, result in found.items():
        print(f"{name:<10} {result['processor_seconds']:8.2f} s {first / result['processor_seconds']:6.1f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
