"""float64 oracle of the shift moments; autograd through it is the oracle of their gradient."""

from torch import Tensor


def shift_moments_reference(
    v: Tensor, v_old: Tensor, b: float | Tensor, s: float | Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """(P, Q) in float64 [B]; coefficients are floats or [B]."""
    scale = b / s
    if isinstance(scale, Tensor):
        scale = scale.double().view(-1, 1)
    d = scale * (v.double() - v_old.double()).flatten(1)
    return (d * eps.double().flatten(1)).mean(1), d.square().mean(1)
