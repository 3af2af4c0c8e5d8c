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
