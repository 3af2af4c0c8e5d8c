"""Against reward hacking: do held-out rewards (weight 0) fall while what is trained rises?

Of each held-out reward the latest `window` iterations that scored it are compared with the first: both means must have
moved by `threshold` standard errors, the trained reward up and the held-out one down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastgrpo.config import Guard


class RewardGuard:
    """What a run has seen of its held-out rewards: `history` by name, rows of (iteration, trained, held-out)."""

    def __init__(self, config: Guard) -> None:
        self.config = config
        self.history: dict[str, list[tuple[int, float, float]]] = {}
        # By how much the KL's weight has been multiplied so far.
        self.kl_scale = 1.0

    def observe(self, iteration: int, trained: float, held_out: Mapping[str, float]) -> list[str]:
        """Takes in an iteration's means (of held-out rewards that were scored); gives those that fall."""
        for name, value in held_out.items():
            self.history.setdefault(name, []).append((iteration, trained, value))
        return [name for name in held_out if self._falls(self.history[name])]

    def raise_kl(self, falling: list[str]) -> None:
        """Multiplies the KL's weight; what falls is measured from here on."""
        self.kl_scale *= self.config.kl_factor
        for name in falling:
            self.history[name] = []

    def _falls(self, rows: list[tuple[int, float, float]]) -> bool:
        window = self.config.window
        if len(rows) < 2 * window:
            return False
        table = np.array(rows, dtype=np.float64)
        trained, held = (moved(table[:window, column], table[-window:, column]) for column in (1, 2))
        return trained > self.config.threshold and held < -self.config.threshold

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "kl_scale": self.kl_scale}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.history = {name: [(int(i), t, h) for i, t, h in rows] for name, rows in state["history"].items()}
        self.kl_scale = state["kl_scale"]


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """The change of the mean in standard errors (Welch's t); ±inf where nothing varies."""
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    change = after.mean() - before.mean()
    if error == 0:
        return float(np.sign(change) * np.inf) if change else 0.0
    return float(change / error)
