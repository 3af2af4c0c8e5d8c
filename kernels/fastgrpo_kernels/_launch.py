"""What every Triton launch needs: rows without copies where possible, coefficients in float32, the grid."""

from typing import Any

from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """[B, D] view of latents whose samples are contiguous, at any batch stride; otherwise a contiguous copy."""
    if tensor.ndim > 1 and tensor[0].is_contiguous():
        return tensor.flatten(1)
    return tensor.contiguous().flatten(1)


def kernel_scalar(value: float | Tensor) -> float | Tensor:
    """A coefficient as kernels read it: a float, or a float32 [B] tensor with unit stride."""
    return value.float().contiguous() if isinstance(value, Tensor) else value


def launch(kernel: Any, programs: int, *args: object, **constants: object) -> None:
    """Run a Triton kernel over a one-dimensional grid (axis 0 alone is unbounded)."""
    kernel[(programs,)](*args, **constants)
