"""What the ATen paths share: coefficients as columns, fused multiply-adds, and a reduction with fixed order."""

import torch
from torch import Tensor

# Elements to a partial sum; below ATen's parallel grain, so that bits depend on neither batch nor threads.
_BLOCK = 4096


def column(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """A coefficient that multiplies latents like `like`: a float, or float32 [B, 1, ...]."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    return coefficient.to(torch.float32).view(-1, *[1] * (like.ndim - 1))


def add_scaled(total: Tensor, coefficient: float | Tensor, term: Tensor) -> None:
    """total += coefficient·term, in place."""
    scale = column(coefficient, total)
    if isinstance(scale, Tensor):
        total.addcmul_(term, scale)
    else:
        total.add_(term, alpha=scale)


def difference(left: Tensor, right: Tensor) -> Tensor:
    """left - right as a new contiguous float32 tensor."""
    out = torch.empty(left.shape, dtype=torch.float32)
    if left.dtype == right.dtype == torch.float32:
        return torch.sub(left, right, out=out)
    return out.copy_(left).sub_(right)


def residual(y: Tensor, x: Tensor, v: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """y - a·x - b·v as a new contiguous float32 tensor."""
    out = torch.empty(y.shape, dtype=torch.float32).copy_(y)
    add_scaled(out, -a, x.to(torch.float32))
    add_scaled(out, -b, v.to(torch.float32))
    return out


def quotient(numerator: float | Tensor, denominator: float | Tensor) -> float | Tensor:
    """numerator/denominator in float64."""
    numerator = numerator.double() if isinstance(numerator, Tensor) else numerator
    return numerator / (denominator.double() if isinstance(denominator, Tensor) else denominator)


def sum_blocks(values: Tensor) -> Tensor:
    """Sum over dim 1 of [B, D], float64 [B]: partial sums of fixed blocks, so that a row's bits are its own."""
    elements = values.shape[1]
    whole = elements - elements % _BLOCK
    total = values[:, whole:].sum(1).double()
    if whole:
        total += values[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2).sum(1, dtype=torch.float64)
    return total


def guide(v: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v_uncond + scale·(v - v_uncond) in float32, rounded to v's dtype."""
    out = difference(v, v_uncond).mul_(column(scale, v))
    return out.add_(v_uncond).to(v.dtype)
