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


def matching_residual_reference(
    v: Tensor, eps: Tensor, x0: Tensor, noise_scale: float | Tensor, x0_scale: float | Tensor
) -> Tensor:
    """The residual v - (noise_scale·ε + x0_scale·x̂0) of an output in float64 [B, D]; scales are floats or [B]."""
    scales = (c.double().view(-1, 1) if isinstance(c, Tensor) else c for c in (noise_scale, x0_scale))
    target = sum(c * t.double().flatten(1) for c, t in zip(scales, (eps, x0), strict=True))
    return v.double().flatten(1) - target
