"""float64 oracle of the Gaussian step."""

from torch import Tensor


def gaussian_step_reference(
    x: Tensor, v: Tensor, a: float | Tensor, b: float | Tensor, s: float | Tensor, eps: Tensor
) -> Tensor:
    """y = a·x + b·v + s·ε in float64; coefficients are floats or [B]."""

    def column(c: float | Tensor) -> float | Tensor:
        return c.double().view(-1, *[1] * (x.ndim - 1)) if isinstance(c, Tensor) else c

    return column(a) * x.double() + column(b) * v.double() + column(s) * eps.double()
