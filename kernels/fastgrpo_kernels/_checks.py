"""Argument checks shared by the operations: each failure is one line that names the argument and the remedy."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Record = TypeVar("Record", bound=tuple)


def replaced(record: Record, **changes: object) -> Record:
    """A named tuple with other values: `_replace`, which `torch.compile` of torch 2.8 does not trace."""
    kind = type(record)
    # Nor does it trace the instance's `_fields`.
    fields = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    values: list[Any] = [changes.get(name, value) for name, value in zip(fields, record, strict=True)]
    return kind(*values)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether an operation may run its body directly: real tensors, and not being traced by torch.compile."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def elements_of(latents: Tensor) -> int:
    """How many elements a sample of [B, ...] latents has."""
    return math.prod(latents.shape[1:])


def is_host_readable(tensor: Tensor) -> bool:
    """Whether reading the values costs no device-to-host copy."""
    return tensor.device.type == "cpu" and is_eager(tensor)


def check_number(name: str, value: object) -> float:
    """A Python or NumPy number as a float, which is what kernels and custom operators take."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """A Python or NumPy integer in [low, high) as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not low <= int(value) < high:
        raise ValueError(f"{name}: must be in [{low}, {_power(high)}), got {value}")
    return int(value)


def _power(value: int) -> str:
    return f"2**{value.bit_length() - 1}" if value >= 1 << 16 and not value & (value - 1) else str(value)


def check_sizes(name: str, value: object) -> list[int]:
    """A shape as a list of integers."""
    if not isinstance(value, Sequence) or not all(isinstance(size, (numbers.Integral, torch.SymInt)) for size in value):
        raise TypeError(f"{name}: expected a sequence of integers, got {value!r}")
    if any(size < 0 for size in value):
        raise ValueError(f"{name}: has a negative size, got {list(value)}")
    return list(value)


def check_dtype(name: str, value: object) -> None:
    """Refuse anything but a dtype of latents."""
    if value not in LATENT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {value!r}")


def check_latents(name: str, value: object, *, like: Tensor | None = None, same_dtype: bool = False) -> None:
    """Refuse anything but non-empty [B, ...] latents of 2 to 5 dimensions, of the shape and device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in LATENT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected dense latents, got {value.layout}; pad what is ragged, and mask the padding")
    if like is None:
        if not 2 <= value.ndim <= 5:
            raise ValueError(f"{name}: expected [B, ...] latents of 2 to 5 dimensions, got shape {list(value.shape)}")
        if value.numel() == 0:
            raise ValueError(f"{name}: has no elements, shape {list(value.shape)}")
        return
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, the other latents on {like.device}; move it there")
    if same_dtype and value.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as the other model output has, got {value.dtype}")


def check_no_grad(**tensors: object) -> None:
    """Refuse a tensor that asks for a gradient that does not exist."""
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: requires a gradient, but none flows into it; pass {name}.detach()")


def per_sample(
    name: str, value: object, like: Tensor, *, positive: bool = False, less_one: bool = False
) -> float | Tensor:
    """A coefficient, `less_one` or not, as a float, or as a float32/float64 [B] tensor on the device of `like`.

    Values are checked where that needs no device-to-host copy.
    """
    if isinstance(value, (float, numbers.Real)) and not isinstance(value, bool):
        number = float(value)
        # Compared: `torch.compile` traces no isfinite of a number that it holds to be dynamic.
        _check_values(name, value, -math.inf < number < math.inf, not positive or number > 0)
        return number - less_one
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a float or a [B] tensor, got {type(value).__name__}")
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != like.shape[0]):
        raise ValueError(f"{name}: expected a scalar or shape [{like.shape[0]}], got {list(value.shape)}")
    value = as_coefficients(name, value, like, positive=positive, less_one=less_one)
    return value if value.ndim else value.expand(like.shape[0])


def as_coefficients(
    name: str, value: Tensor, like: Tensor, *, positive: bool = False, less_one: bool = False
) -> Tensor:
    """Coefficients of any shape, `less_one` or not, on the device of `like`; a device's in float32."""
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float64 or float32, got {value.dtype}")
    if is_host_readable(value):
        _check_readable(name, value, positive=positive)
    if less_one:
        value = value - 1.0
    if like.device.type != "cpu":
        value = value.to(device=like.device, dtype=torch.float32, non_blocking=True)
    elif value.device.type != "cpu":
        raise ValueError(f"{name}: is on {value.device}, the latents on cpu; move it there")
    return value


def check_traced(**rows: Tensor | None) -> None:
    """In the body of a custom operator: refuse coefficients that tracing could not read; `s` must be positive."""
    for name, value in rows.items():
        if value is not None and value.device.type == "cpu":
            _check_readable(name, value, positive=name == "s")


def _check_readable(name: str, value: Tensor, *, positive: bool) -> None:
    if value.numel() > 256:
        _check_values(name, value, bool(torch.isfinite(value).all()), not positive or bool((value > 0).all()))
        return
    # Of few numbers Python is done before two operations are.
    numbers_ = (value if value.ndim == 1 else value.flatten()).tolist()
    _check_values(name, value, all(map(math.isfinite, numbers_)), not positive or min(numbers_, default=1.0) > 0)


def _check_values(name: str, value: object, finite: bool, in_range: bool) -> None:
    if not finite:
        raise ValueError(f"{name}: must be finite, got {offender(value, lambda t: ~torch.isfinite(t))}")
    if not in_range:
        found = offender(value, lambda t: t <= 0)
        raise ValueError(f"{name}: must be positive for the step to have a density, got {found}")


def offender(value: object, wrong: Callable[[Tensor], Tensor]) -> object:
    """What the one line of an error shows of a value: of a tensor the first number that is wrong."""
    return value[wrong(value)][0].item() if isinstance(value, Tensor) else value


def check_guidance(v: Tensor, v_uncond: object, guidance_scale: object) -> float | Tensor | None:
    """The guidance scale, checked together with the unconditional output: both or neither."""
    if v_uncond is None and guidance_scale is None:
        return None
    if v_uncond is None:
        raise ValueError("v_uncond: guidance_scale needs the unconditional output; or pass guided v alone")
    if guidance_scale is None:
        raise ValueError("guidance_scale: v_uncond needs a scale; v is then the conditional output")
    check_latents("v_uncond", v_uncond, like=v, same_dtype=True)
    check_no_grad(guidance_scale=guidance_scale)
    return per_sample("guidance_scale", guidance_scale, v)


def as_rows(coefficients: Sequence[float | Tensor], like: Tensor) -> list[Tensor]:
    """Coefficients as [B] tensors, for the custom operators, whose schema has no union of float and tensor."""
    batch, device = like.shape[0], like.device
    # Floats stay float64 on the CPU; kernels read float32.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return [c if isinstance(c, Tensor) else torch.full((batch,), c, dtype=dtype, device=device) for c in coefficients]
