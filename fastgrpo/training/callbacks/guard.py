"""Against reward hacking: stops the run, or raises its KL weight, where held-out rewards fall (algorithms/guard.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgrpo.algorithms.guard import RewardGuard
from fastgrpo.config import Config
from fastgrpo.rewards.scoring import AllScores
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class GuardCallback(Callback):
    """Watches the rewards of weight 0 beside what is trained."""

    name = "guard"

    def __init__(self, config: Config) -> None:
        self.config, self.guard = config, RewardGuard(config.guard)

    def on_start(self, trainer: Trainer) -> None:
        self._set_kl_weight(trainer)

    def on_scored(
        self, trainer: Trainer, iteration: int, scored: AllScores, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        held = {}
        for row, spec in enumerate(self.config.scored):
            counted = scored.values[row][scored.valid[row] & scored.asked[row]]
            if spec.weight == 0 and len(counted):
                held[spec.key] = float(counted.mean())
        falling = self.guard.observe(iteration, metrics["reward/mean"], held)
        names, action = ", ".join(falling), self.config.guard.action
        if falling and action == "stop":
            trainer.halted = (
                f"guard.action: stopped at iteration {trainer.iteration} with a checkpoint: held-out {names} fell "
                "while the trained reward rose; look at the images, then go on with run.resume=true guard.action=off, "
                "or change the rewards"
            )
        if falling and action == "raise_kl":
            self.guard.raise_kl(falling)
            self._set_kl_weight(trainer)
            trainer.note(f"held-out {names} fell: objective.kl_weight × {self.guard.kl_scale:g} from here on")
        known = {"guard/falling": float(len(falling))} if held else {}
        return known | ({"guard/kl_weight": trainer.kl_weight} if action == "raise_kl" else {})

    def _set_kl_weight(self, trainer: Trainer) -> None:
        trainer.kl_weight = self.config.objective.kl_weight * self.guard.kl_scale

    def state(self) -> dict[str, Any]:
        return self.guard.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.guard.restore(state)
