"""Inputs and tolerances shared by the kernel tests."""

import sys
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

import fastgrpo_kernels
from fastgrpo_kernels import STREAM_SDE, NoiseKey, noise_key, normal, transitions

# Where Triton runs: the interpreter takes CPU tensors.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 3-D to 5-D; sizes that are neither powers of two nor multiples of four; one element; more than one block.
SHAPES = ((3, 1, 1), (2, 7, 9), (3, 4, 10, 25), (2, 1, 17, 241), (2, 3, 5, 8, 35))

# One unit in the last place of a stored value: the interpreter truncates where hardware rounds.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


Fields = TypeVar("Fields", bound=tuple)


class Case(NamedTuple):
    x: Tensor
    v: Tensor
    v_old: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    key: NoiseKey
    eps: Tensor


def make_case(shape: tuple[int, ...], dtype: torch.dtype, *, shift: float = 0.05, seed: int = 0) -> Case:
    """Latents in float32, model outputs in `dtype` that differ by about `shift`, every sample at a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    x, v, delta = (torch.randn(shape, generator=generator) for _ in range(3))
    sigma = torch.linspace(0.95, 0.3, shape[0], dtype=torch.float64)
    a, b, s = map(torch.as_tensor, transitions.dance_sde(sigma, sigma - 0.1, 0.3))
    ids = torch.arange(shape[0]) * 7 + 5
    key = noise_key(2**40 + seed, ids, torch.arange(shape[0]), 3, STREAM_SDE, "cpu")
    v_old = v + shift * delta
    return Case(x, v.to(dtype), v_old.to(dtype), a, b, s, key, normal(key, shape[1:]))


def gradient_of(leaf: Tensor) -> Tensor:
    """A leaf's gradient, which it must have."""
    assert leaf.grad is not None
    return leaf.grad


def on_device(fields: Fields, device: str = KERNEL_DEVICE) -> Fields:
    """A NamedTuple with its tensors, and those of its keys, on a device."""
    values: dict[str, object] = cast(Any, fields)._asdict()
    return cast(Any, fields)._replace(**{name: _moved(value, device) for name, value in values.items()})


def _moved(value: object, device: str) -> object:
    if isinstance(value, NoiseKey):
        return NoiseKey(value.seed, value.words.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def modules_with(name):
    """Modules of the package that hold a function of `_launch` under its name."""
    prefix = fastgrpo_kernels.__name__ + "."
    return [m for n, m in list(sys.modules.items()) if n.startswith(prefix) and name in vars(m)]


def assert_within(actual: Tensor | None, expected: Tensor | None, *, relative: float, of_largest: float) -> None:
    """|actual - expected| <= relative·|expected| + of_largest·max|expected|, element by element; NaN and None fail."""
    assert actual is not None
    assert expected is not None
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    bound = relative * expected.abs() + of_largest * expected.abs().max()
    worst = ((actual - expected).abs() - bound).max()
    assert worst <= 0, f"off by {float(worst):.3e} beyond the bound; largest value {float(expected.abs().max()):.3e}"
