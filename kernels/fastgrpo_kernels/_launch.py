"""What every Triton launch needs: rows without copies where possible, coefficients in float32, the grid, counters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Counters of programs that have arrived, by device and stream. Kernels leave them at zero.
_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def launches(tensor: Tensor) -> bool:
    """Whether operations on this tensor launch Triton kernels: on every device but the CPU."""
    return tensor.device.type != "cpu"


def is_traced_plainly(tensor: Tensor) -> bool:
    """Whether `torch.compile` is to see an operation's formula instead of an operator: on a CPU, where Inductor fuses
    the formula with what stands around it and writes a loop that is as fast as any."""
    return torch.compiler.is_compiling() and not launches(tensor)


def rows(tensor: Tensor) -> Tensor:
    """[B, D] view of latents whose samples are contiguous, at any batch stride; otherwise a contiguous copy.

    Noise from a key belongs to an element's index, so kernels read elements in the order of their indices: a layout
    such as channels-last is copied, once in each direction.
    """
    if tensor.is_contiguous() or (tensor.ndim > 1 and tensor[0].is_contiguous()):
        return tensor.flatten(1)
    return tensor.contiguous().flatten(1)


def row_strides(tensors: Sequence[Tensor | None], elements: int) -> list[int | None]:
    """Batch strides of rows [B, D]; None where it is D: what is dense shares its offsets, which saves registers."""
    return [None if t is None or t.stride(0) == elements else t.stride(0) for t in tensors]


def kernel_scalar(value: float | Tensor) -> float | Tensor:
    """A coefficient as kernels read it: a float, or a float32 [B] tensor of any stride."""
    return value.float() if isinstance(value, Tensor) else value


def coefficient_steps(names: Iterable[str], coefficients: Sequence[float | Tensor]) -> dict[str, int | None]:
    """The kernels' `<name>_step`: a [B] coefficient's stride, such as that of a table's column, None of a number."""
    steps = (c.stride(0) if isinstance(c, Tensor) else None for c in coefficients)
    return {f"{name}_step": step for name, step in zip(names, steps, strict=True)}


def arrivals(count: int, device: torch.device, *, kept: bool) -> Tensor:
    """Zeroed counters, int32, `count` at least, for `reduction.is_last_of_row`.

    `kept` counters belong to a device and stream: launches on one stream follow each other and share them, so an eager
    call costs no launch more. Counters that live as long as a call are needed in a CUDA graph, which zeroes its own
    when it is replayed, and in custom operators: `torch.compile` may run these inside a graph's memory pool before it
    captures them, and nothing of that pool may outlive the call.
    """
    on_cuda = device.type == "cuda"
    if not kept or (on_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    if key not in _arrivals or _arrivals[key].numel() < count:
        _arrivals[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _arrivals[key]


def launch(kernel: Any, programs: int, device: torch.device, *args: object, **constants: object) -> None:
    """Run a Triton kernel over a one-dimensional grid (axis 0 alone is unbounded) on the device of its tensors.

    `num_warps` counts warps of 32 threads. Triton launches on the current device and stream, whatever its tensors are
    on; changing the device costs microseconds, asking for it does not.
    """
    if torch.version.hip:
        constants = hip_options(constants, torch.cuda.get_device_properties(device).warp_size)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def hip_options(options: dict[str, Any], warp: int) -> dict[str, Any]:
    """Launch options on AMD: warps of its size, 256 threads at least; its compiler takes no limit of registers."""
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    return options | {"num_warps": max(options["num_warps"] * 32, 256) // warp}
