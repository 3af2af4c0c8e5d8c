"""What a reward is: decoded samples in memory and their prompts in; a score and a validity per sample out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from fastgrpo.prompts import Prompt


@dataclass(frozen=True)
class Scores:
    """values: float64 [B]; valid: bool [B], False where no score could be given (never a made-up number);
    components: further named float64 [B] for logs and evaluation."""

    values: np.ndarray
    valid: np.ndarray
    components: dict[str, np.ndarray] = field(default_factory=dict)


class Reward(Protocol):
    def score(self, samples: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """samples: [B, 3, H, W] (or [B, 3, F, H, W]) in [0, 1], float32, on a CPU."""
        ...
