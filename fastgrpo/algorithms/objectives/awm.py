"""Advantage-weighted matching (arXiv 2509.25050): PPO's clipped ratio, with the forward process's loss as likelihood.

A row's log-probability is −w(M, t) of its squared error M = mean((v − u)²): M, t·M, t²·M, or a root of it ("huber":
t·(√(M + δ) − √δ), "ghuber": t/p·((M + δ)^p − δ^p), with δ = 1e-10). Ratios are of single rows ("exp_first").
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.algorithms.objectives.base import ForwardObjective, RowInputs, RowLosses, RowSums
from fastgrpo.config import Config

DELTA = 1e-10


class AWM(ForwardObjective):
    """Advantage-weighted matching, with the weighting that objective.weighting names."""

    settings = ("clip_low", "clip_high", "weighting", "power", "old_decay", "old_weight")

    def __init__(self, config: Config) -> None:
        objective = config.objective
        self.weighting, self.power = objective.weighting, objective.power
        # For R.
        self.branches = 1.0 if self.weighting in ("huber", "ghuber") else None
        self.low, self.high = 1 - objective.clip_low, 1 + objective.clip_high

    def log_ratio(self, sums: RowSums, t: Tensor) -> Tensor:
        """log p − log p_old of each row, [B]; exactly 0 where v is v_old."""
        change = sums.change
        if sums.R is not None:
            before = sums.R + DELTA
            # Rounding may leave M a little below 0.
            after = (sums.R + change).clamp(min=0) + DELTA
            if self.weighting == "huber":
                # The difference of two roots, without the subtraction.
                return -t * change / (after.sqrt() + before.sqrt())
            grown = torch.expm1(self.power * torch.log1p((after - before) / before))
            return -t / self.power * before.pow(self.power) * grown
        return -change * {"uniform": 1.0, "t": t, "t**2": t.square()}[self.weighting]

    def losses(self, sums: RowSums, rows: RowInputs) -> RowLosses:
        ratio = self.log_ratio(sums, rows.t).exp()
        free = -rows.advantages * ratio
        bound = -rows.advantages * ratio.clamp(self.low, self.high)
        return RowLosses(torch.maximum(free, bound), ratio, (bound > free).float())
