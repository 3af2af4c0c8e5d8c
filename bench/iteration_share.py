"""Where an iteration's time goes: the share outside transformer, VAE and reward.

python bench/iteration_share.py configs/shapes-flux.yaml [key.sub=value …]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from fastgrpo.config import load_config
from fastgrpo.training.trainer import Trainer

# Enough for most prompts to have been encoded: each is encoded once in a run.
WARM_UP, COUNTED = 20, 20


def main(path: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as run_dir:
        quiet = ["telemetry.progress=false", "eval.every=0", f"run.dir={run_dir}/run"]
        trainer = Trainer.from_config(load_config(path, [*overrides, *quiet]))
        spent: dict[str, float] = {}
        family = trainer.family
        # Frozen evaluations and those with gradients; the backward of a loss is the transformer's, but for the loss.
        timed(family, "predict", "transformer forward", spent)
        timed(family, "decode", "VAE decode", spent)
        timed(family, "encode_prompts", "text encoders", spent)
        timed(torch.Tensor, "backward", "backward", spent)
        for reward in trainer.rewards.values():
            timed(reward, "score", "reward", spent)
        for _ in range(WARM_UP):
            trainer.step()
        spent.clear()
        begin = time.process_time()
        for _ in range(COUNTED):
            trainer.step()
        total = time.process_time() - begin
    for name, seconds in [*spent.items(), ("everything else", total - sum(spent.values()))]:
        print(f"{name:<20} {seconds / COUNTED:8.4f} s  {seconds / total:6.1%}")
    print(f"{'iteration':<20} {total / COUNTED:8.4f} s")


def timed(owner: Any, method: str, name: str, spent: dict[str, float]) -> None:
    """Adds the processor seconds of every call of owner.method to spent[name]."""
    call: Callable = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - begin

    setattr(owner, method, wrapped)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
