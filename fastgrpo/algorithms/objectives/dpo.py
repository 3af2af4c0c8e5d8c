"""Diffusion-DPO (arXiv 2311.12908), online: of each group the best sample is preferred to the worst.

A pair's loss is −log σ(−β/2·(m_best − m_worst)), where m is a row's squared error less the reference model's: 2P + Q
with the reference's output for v_old. A pair shares t and ε, and stands in one micro-batch.
"""

from __future__ import annotations

from torch.nn.functional import softplus

from fastgrpo.algorithms.objectives.base import ForwardObjective, RowInputs, RowLosses, RowSums
from fastgrpo.config import Config
from fastgrpo.errors import ConfigError

BETA = 2000.0


class DPO(ForwardObjective):
    """Online Diffusion-DPO, and its form for flows."""

    against = "reference"
    paired = True
    settings = ("beta", "pairs")

    def __init__(self, config: Config) -> None:
        self.beta = BETA if config.objective.beta is None else config.objective.beta
        objective, group = config.objective, config.rollout.group_size
        if 2 * objective.pairs > group:
            raise ConfigError(
                f"objective.pairs: {objective.pairs} pairs need {2 * objective.pairs} samples, and "
                f"rollout.group_size is {group}"
            )
        if objective.kl_weight:
            raise ConfigError("objective.kl_weight: dpo holds to the reference by objective.beta; set it to 0")

    def losses(self, sums: RowSums, rows: RowInputs) -> RowLosses:
        change = sums.change.view(-1, 2)
        loss = softplus(self.beta / 2 * (change[:, 0] - change[:, 1]))
        # Of both rows of a pair, so that the mean over rows is that over pairs.
        return RowLosses(loss.repeat_interleave(2), (-sums.change).exp())
