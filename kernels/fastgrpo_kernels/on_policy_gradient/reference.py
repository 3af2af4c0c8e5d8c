"""float64 oracle of the on-policy gradient: autograd through the ratio itself, at v = v_old."""

import torch
from torch import Tensor


def on_policy_gradient_reference(advantage_weight: Tensor, b: float | Tensor, s: float | Tensor, eps: Tensor) -> Tensor:
    """∂/∂v of -Σ advantage_weight·exp(log-ratio) in float64, where the policy is the one that sampled."""
    b, s = (torch.as_tensor(c, dtype=torch.float64, device=eps.device).view(-1, 1) for c in (b, s))
    eps64 = eps.double().flatten(1)
    v = torch.zeros_like(eps64, requires_grad=True)
    y = s * eps64
    log_ratio = -0.5 * (((y - b * v) / s).square() - eps64.square()).mean(1)
    loss = -(advantage_weight.double() * log_ratio.exp()).sum()
    (grad,) = torch.autograd.grad(loss, v)
    return grad.view(eps.shape)
