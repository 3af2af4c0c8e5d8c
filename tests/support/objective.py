"""The oracle of the policy loss: (P, Q, A) to loss and statistics, in plain PyTorch on [B]-sized tensors.

P = M[d·ε] and Q = M[d²] are the shift moments of the policy since the rollout (fastgrpo_kernels.shift_moments), so
log π_new − log π_old = P − Q/2 and KL(old‖new) = Q/2, both as means over a sample's latent elements. Autograd flows
through them. Clip: PPO (arXiv 1707.06347) as in DanceGRPO (arXiv 2505.07818); dual clip: arXiv 1912.09729;
RatioNorm: GRPO-Guard (arXiv 2510.22319); the trust-region mask: Flow-DPPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.config import ObjectiveConfig

SUMMED = ("ratio", "clipped", "kl", "dropped", "loss", "weight")


@dataclass
class Statistics:
    """Device-side sums over pairs: never read before the iteration's one host synchronization.

    sums: float64 [len(SUMMED)], weighted by `weight`; max_deviation: float64 [], max |ratio − 1|.
    """

    sums: Tensor
    max_deviation: Tensor

    @staticmethod
    def zeros(device: torch.device) -> Statistics:
        zeros = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)
        return Statistics(zeros, torch.zeros((), dtype=torch.float64, device=device))

    def add(self, other: Statistics) -> None:
        self.sums += other.sums
        self.max_deviation = torch.maximum(self.max_deviation, other.max_deviation)


def log_ratio(P: Tensor, Q: Tensor, s: Tensor, kind: str) -> Tensor:
    """The log of the ratio the objective clips, [B]; differentiable in P and Q.

    gaussian: P − Q/2 = log π_new − log π_old. unit: 2s²(P − Q/2), the form of CPS trainers, whose log-prob lacks
    1/(2s²). ratio_norm: s·P (GRPO-Guard, per sample).
    """
    if kind == "ratio_norm":
        return s * P
    gaussian = P - Q / 2
    return 2 * s * s * gaussian if kind == "unit" else gaussian


def policy_loss(
    P: Tensor,
    Q: Tensor,
    s: Tensor,
    advantage: Tensor,
    weight: Tensor,
    config: ObjectiveConfig,
    Q_reference: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """The weighted sum of the pairs' losses, a scalar differentiable in P, Q and Q_reference, and its statistics.

    All arguments are [B]: shift moments, transition scale s, advantage, and the weight of a pair (0 for padding).
    An advantage of [B, T] is T clipped losses, summed: one for each reward, its weight inside (DanceGRPO's). Dividing
    by the number of planned pairs is the caller's, who alone knows it.
    """
    ratio = torch.exp(log_ratio(P, Q, s, config.ratio))
    clamped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    terms = advantage.reshape(len(ratio), -1)
    unclipped, clipped = -terms * ratio[:, None], -terms * clamped[:, None]
    losses = torch.maximum(unclipped, clipped)
    if config.dual_clip is not None:
        losses = torch.where(terms < 0, torch.minimum(losses, -terms * config.dual_clip), losses)
    dropped = torch.zeros_like(losses, dtype=torch.bool)
    if config.dppo_threshold is not None:
        above, below = (ratio > 1)[:, None], (ratio < 1)[:, None]
        outwards = (above & (terms > 0)) | (below & (terms < 0))
        dropped = outwards & (config.dppo_threshold <= Q / 2)[:, None]
        losses = torch.where(dropped, torch.zeros_like(losses), losses)
    loss = losses.sum(dim=1)
    if Q_reference is not None:
        loss = loss + config.kl_weight * Q_reference / 2
    total = (weight * loss).sum()

    with torch.no_grad():
        kl = (Q if Q_reference is None else Q_reference) / 2
        shares = [mask.to(ratio.dtype).mean(dim=1) for mask in (clipped > unclipped, dropped)]
        columns = (ratio, shares[0], kl, shares[1], loss, torch.ones_like(ratio))
        sums = torch.stack([(weight * column).sum(dtype=torch.float64) for column in columns])
        deviation = torch.where(weight > 0, (ratio - 1).abs(), torch.zeros_like(ratio)).amax().double()
    return total, Statistics(sums, deviation)
