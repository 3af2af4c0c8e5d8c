"""DiffusionNFT (arXiv 2509.16117): the policy goes towards good samples on one branch, away from bad ones on the other.

With v± = v_old ± β·(v − v_old) and r = clamp(A/(2c) + ½, 0, 1), a sample's loss is c/β·(r·L⁺ + (1−r)·L⁻), where L± is
the squared error of the clean sample that v± predicts, divided by its mean absolute error (no gradient through that),
which is at least 1e-5. Over the elements of a row, with t = ∂x̂0/∂v:

    L± = t²·(R ± 2β·P + β²·Q) / max(t·mean|e ± β·d|, 1e-5)
"""

from __future__ import annotations

from fastgrpo.algorithms.objectives.base import ForwardObjective, RowInputs, RowLosses, RowSums
from fastgrpo.config import Config

SMALLEST_WEIGHT = 1e-5


class NFT(ForwardObjective):
    """DiffusionNFT; c is advantage.clip."""

    settings = ("beta", "old_decay", "old_weight")
    # r is ½ there: both branches pull, and hold the policy near the old one.
    trains_zero = True

    def __init__(self, config: Config) -> None:
        self.beta = config.objective.beta or 1.0
        self.clip = config.advantage.clip
        self.branches = self.beta

    def losses(self, sums: RowSums, rows: RowInputs) -> RowLosses:
        assert sums.R is not None
        assert sums.above is not None
        assert sums.below is not None
        share = (rows.advantages / (2 * self.clip) + 0.5).clamp(0, 1)
        even, odd = sums.R + self.beta**2 * sums.Q, 2 * self.beta * sums.P
        square = rows.clean.square()
        above = square * (even + odd) / (rows.clean * sums.above).clamp(min=SMALLEST_WEIGHT)
        below = square * (even - odd) / (rows.clean * sums.below).clamp(min=SMALLEST_WEIGHT)
        loss = (self.clip / self.beta) * (share * above + (1 - share) * below)
        return RowLosses(loss, (-sums.change).exp())
