"""What every Triton launch needs: rows without copies where possible, coefficients in float32, the grid, counters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Counters of programs that have arrived, by device and stream. Kernels leave them at zero.
_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def rows(tensor: Tensor) -> Tensor:
    """[B, D] view of latents whose samples are contiguous, at any batch stride; otherwise a contiguous copy."""
    if tensor.ndim > 1 and tensor[0].is_contiguous():
        return tensor.flatten(1)
    return tensor.contiguous().flatten(1)


def row_strides(tensors: Sequence[Tensor | None], elements: int) -> list[int | None]:
    """Batch strides of rows [B, D]; None where it is D: what is dense shares its offsets, which saves registers."""
    return [None if t is None or t.stride(0) == elements else t.stride(0) for t in tensors]


def kernel_scalar(value: float | Tensor) -> float | Tensor:
    """A coefficient as kernels read it: a float, or a float32 [B] tensor with unit stride."""
    return value.float().contiguous() if isinstance(value, Tensor) else value


def arrivals(batch: int, device: torch.device) -> Tensor:
    """Zeroed counters, int32, one a row at least, for `reduction.is_last_of_row`.

    Launches on one stream follow each other and share them. A graph that is being captured gets its own, zeroed in it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _arrivals or _arrivals[key].numel() < batch:
        _arrivals[key] = torch.zeros(max(batch, 1024), dtype=torch.int32, device=device)
    return _arrivals[key]


def launch(kernel: Any, programs: int, *args: object, **constants: object) -> None:
    """Run a Triton kernel over a one-dimensional grid (axis 0 alone is unbounded).

    `num_warps` counts warps of 32 threads.
    """
    if torch.version.hip:
        constants = hip_options(constants, torch.cuda.get_device_properties().warp_size)
    kernel[(programs,)](*args, **constants)


def hip_options(options: dict[str, Any], warp: int) -> dict[str, Any]:
    """Launch options on AMD: warps of its size, 256 threads at least; its compiler takes no limit of registers."""
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    return options | {"num_warps": max(options["num_warps"] * 32, 256) // warp}
