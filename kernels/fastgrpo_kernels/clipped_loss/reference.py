"""float64 oracle of the clipped loss; autograd through it is the oracle of its gradient factors."""

import torch
from torch import Tensor


def clipped_loss_reference(
    P: Tensor,
    Q: Tensor,
    s: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str = "gaussian",
    dual_clip: float | None = None,
    dppo_threshold: float | None = None,
    kl_weight: float = 0.0,
    Q_reference: Tensor | None = None,
    elements: int = 1,
) -> Tensor:
    """The loss in float64; all tensors are [B]; `elements` is D for log-probabilities summed over elements."""
    P, Q = P.double() * elements, Q.double() * elements
    log_ratio = {"gaussian": P - Q / 2, "unit": 2 * s * s * (P - Q / 2), "ratio_norm": s * P}[ratio]
    r = log_ratio.exp()
    surrogate = torch.minimum(advantage * r, advantage * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    if dppo_threshold is not None:
        dropped = ((r - 1) * advantage > 0) & (dppo_threshold <= Q / 2)
        surrogate = surrogate.masked_fill(dropped, 0.0)
    if Q_reference is not None:
        surrogate = surrogate - kl_weight * Q_reference.double() * elements / 2
    return -(weight * surrogate).sum()


def nft_loss_reference(
    v: Tensor, v_old: Tensor, target: Tensor, t: Tensor, r: Tensor, weight: Tensor, *, beta: float, clip: float
) -> Tensor:
    """DiffusionNFT's loss in float64 from outputs and target [B, D], t, r and weight [B]: arXiv 2509.16117, with the
    adaptive weights of its code."""
    v_old, target, t = v_old.double(), target.double(), t.double().view(-1, 1)
    losses = []
    for sign in (1, -1):
        distance = t * (v_old + sign * beta * (v.double() - v_old) - target)
        losses.append((distance.square() / distance.detach().abs().mean(1, keepdim=True).clamp_min(1e-5)).mean(1))
    return (weight * clip / beta * (r * losses[0] + (1 - r) * losses[1])).sum()


def awm_log_prob_reference(v: Tensor, target: Tensor, t: Tensor, weighting: str) -> Tensor:
    """AWM's log-probability (arXiv 2509.25050) in float64 [B], from outputs and target [B, D] and t [B]."""
    distance = (v.double() - target.double()).square().mean(1)
    if weighting == "huber":
        return -((distance + 1e-10).sqrt() - 1e-5) * t
    return -distance * {"Uniform": 1.0, "t": t, "t**2": t * t}[weighting]
