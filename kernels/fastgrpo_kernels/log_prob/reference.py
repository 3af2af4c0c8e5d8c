"""float64 oracle of the log-probability; autograd through it is the oracle of its gradient."""

import math

import torch
from torch import Tensor


def log_prob_reference(
    x: Tensor, v: Tensor, y: Tensor, a: float | Tensor, b: float | Tensor, s: float | Tensor
) -> Tensor:
    """mean(-(y - a·x - b·v)²/(2s²)) - log s - ½·log 2π in float64 [B]; coefficients are floats or [B]."""
    a, b, s = (torch.as_tensor(c, dtype=torch.float64, device=x.device).view(-1, 1) for c in (a, b, s))
    x, v, y = (t.double().flatten(1) for t in (x, v, y))
    z = (y - a * x - b * v) / s
    return (-0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi)).mean(1)
