"""Public log-probability: checks, CPU path, Triton launches, custom operators and gradient."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import as_rows, check_latents, check_no_grad, check_traced, elements_of, is_eager, per_sample
from .._cpu import BlockSums, Tile, column, quotient, residual, tile_coefficient, tiles
from .._launch import arrivals, coefficient_steps, kernel_scalar, launch, launches, rows
from .._noise_args import check_less_one

Coefficient = float | Tensor


def log_prob(
    x: Tensor,
    v: Tensor,
    y: Tensor,
    a: Coefficient | None,
    b: Coefficient,
    s: Coefficient,
    *,
    a_less_one: Coefficient | None = None,
) -> Tensor:
    """Computes log N(y; a·x + b·v, s²): mean(-(y - a·x - b·v)²/(2s²)) - log s - ½·log 2π.

    Trainers that sum over elements have D times it. Everything is computed in float32, but for a - 1, in a's own
    precision. Differentiable once, in `v` alone: b·(y - a·x - b·v)/(s²·D), in v's dtype. For the ratio of two policies
    use `shift_moments`: a difference of two float32 log-probabilities is off by up to 1.3e-7, `P - Q/2` by 1e-12.

    Args:
        x: Latents before the step, [B, ...] of 2 to 5 dimensions: float32, bfloat16 or float16, any strides.
        v: The model output, of x's shape, in a dtype of its own.
        y: Latents after the step, as they were stored, of x's shape, in a dtype of their own.
        a: The coefficient of x, a float or [B] float64 or float32 (see `transitions`); None where a_less_one is given.
        b: The coefficient of v, like a.
        s: The step's standard deviation, > 0, like a.
        a_less_one: a - 1, where it is known more exactly than a.

    Returns:
        The mean over each sample's elements, float32 [B].

    Raises:
        ValueError: Shapes, devices or values do not fit: s <= 0, coefficients that are not finite (checked where
            reading them costs no device-to-host copy), a gradient asked of anything but `v`, a double backward.
        TypeError: A dtype or a type does not fit.
    """
    check_latents("x", x)
    check_latents("v", v, like=x)
    check_latents("y", y, like=x)
    less_one = check_less_one("", a, a_less_one, x)
    b, s = per_sample("b", b, x), per_sample("s", s, x, positive=True)
    check_no_grad(x=x, y=y, b=b, s=s)
    return checked_log_prob(x, v, y, less_one, b, s)


def checked_log_prob(
    x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient, s: Coefficient | None
) -> Tensor:
    """`log_prob` of checked arguments, with a - 1 for a; without s -mean((y - a·x - b·v)²), as CPS trainers have it."""
    if not is_eager(x, v, y):
        given = (a_less_one, b) if s is None else (a_less_one, b, s)
        return _log_prob_op(x, v, y, *as_rows(given, x))
    if torch.is_grad_enabled() and v.requires_grad:
        return _LogProb.apply(x, v, y, a_less_one, b, s)  # pyright: ignore[reportReturnType]
    return _forward(x, v, y, a_less_one, b, s)


def _forward(x, v, y, a_less_one, b, s, *, kept: bool = True) -> Tensor:
    if launches(x):
        return launch_log_prob(x, v, y, a_less_one, b, s, kept=kept)
    return log_prob_cpu(x, v, y, a_less_one, b, s)


def _backward(grad, x, v, y, a_less_one, b, s) -> Tensor:
    body = launch_log_prob_backward if launches(x) else log_prob_backward_cpu
    return body(grad, x, v, y, a_less_one, b, s)


def log_prob_cpu(
    x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient, s: Coefficient | None
) -> Tensor:
    """The ATen path: float32 sums in blocks, scaled once per sample in float64."""
    elements = elements_of(v)
    sums = BlockSums(1, v.shape[0], elements)
    for tile, z in _residuals(x, v, y, a_less_one, b):
        if s is not None:
            z.mul_(column(quotient(1.0, tile_coefficient(s, tile)), z))
        sums.add(0, tile, z.square_())
    mean_square = sums.total()[0] / elements
    if s is None:
        return -mean_square.to(torch.float32)
    log_s = s.double().log() if isinstance(s, Tensor) else math.log(s)
    return (-0.5 * mean_square - log_s - 0.5 * math.log(2.0 * math.pi)).to(torch.float32)


def log_prob_backward_cpu(
    grad: Tensor, x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient, s: Coefficient | None
) -> Tensor:
    """Gradient of v in ATen."""
    factor = grad.double() * (2.0 * b if s is None else quotient(quotient(b, s), s)) / elements_of(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for tile, z in _residuals(x, v, y, a_less_one, b):
        z.mul_(column(tile_coefficient(factor, tile), z))
        if tile is None:
            return z.to(v.dtype).view(v.shape)
        out.flatten(1)[tile] = z
    return out


def _residuals(
    x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient
) -> Iterator[tuple[Tile | None, Tensor]]:
    """(tile, y - a·x - b·v of it, float32 [rows, columns])."""
    x, v, y = rows(x), rows(v), rows(y)
    for tile in tiles(*v.shape):
        latents = (y, x, v) if tile is None else (y[tile], x[tile], v[tile])
        yield tile, residual(*latents, tile_coefficient(a_less_one, tile), tile_coefficient(b, tile))


def launch_log_prob(
    x: Tensor,
    v: Tensor,
    y: Tensor,
    a_less_one: Coefficient,
    b: Coefficient,
    s: Coefficient | None,
    *,
    kept: bool = True,
) -> Tensor:
    """The Triton path, one launch: partial sums to their own slots, which the last program of a row adds."""
    from ..noise_kernel import BLOCK
    from .kernel import _log_prob_fwd_kernel

    inputs, shape, constants = _kernel_arguments(x, v, y, a_less_one, b, s)
    batch, elements, blocks = shape
    out = torch.empty(batch, dtype=torch.float32, device=x.device)
    partials = torch.empty((batch, blocks), dtype=torch.float32, device=x.device)
    arguments = out, partials, arrivals(batch, x.device, kept=kept), *inputs, elements, blocks
    launch(_log_prob_fwd_kernel, batch * blocks, x.device, *arguments, **constants, BLOCK=BLOCK)
    return out


def launch_log_prob_backward(
    grad: Tensor, x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient, s: Coefficient | None
) -> Tensor:
    """Gradient of v by Triton: one launch."""
    from ..noise_kernel import BLOCK
    from .kernel import _log_prob_bwd_kernel

    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    inputs, shape, constants = _kernel_arguments(x, v, y, a_less_one, b, s)
    batch, elements, blocks = shape
    arguments = grad_v, grad.contiguous(), *inputs, elements, blocks
    launch(_log_prob_bwd_kernel, batch * blocks, x.device, *arguments, **constants, BLOCK=BLOCK)
    return grad_v


def _kernel_arguments(x: Tensor, v: Tensor, y: Tensor, a_less_one: Coefficient, b: Coefficient, s: Coefficient | None):
    """(pointers, coefficients and strides), (B, D, blocks of a row), and the constants of both kernels over latents."""
    from ..noise_kernel import BLOCK, READ_WARPS

    x, v, y = rows(x), rows(v), rows(y)
    a_less_one, b, s = kernel_scalar(a_less_one), kernel_scalar(b), None if s is None else kernel_scalar(s)
    constants = coefficient_steps("abs", (a_less_one, b, 0.0 if s is None else s))
    inputs = x, v, y, a_less_one, b, s, x.stride(0), v.stride(0), y.stride(0)
    return inputs, (*x.shape, -(-x.shape[1] // BLOCK)), {**constants, "num_warps": READ_WARPS}


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, y, a_less_one, b, s):
        save_arguments(ctx, (x, v, y, a_less_one, b, s))
        return _forward(x, v, y, a_less_one, b, s)

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("log_prob")
        return None, _backward(grads[0], *saved_arguments(ctx)), *[None] * 4


@torch.library.custom_op("fastgrpo_kernels::log_prob", mutates_args=())
def _log_prob_op(x: Tensor, v: Tensor, y: Tensor, a_less_one: Tensor, b: Tensor, s: Tensor | None = None) -> Tensor:
    check_traced(a=a_less_one, b=b, s=s)
    return _forward(x, v, y, a_less_one, b, s, kept=False)


@_log_prob_op.register_fake
def _(x, v, y, a_less_one, b, s=None):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastgrpo_kernels::log_prob_backward", mutates_args=())
def _log_prob_backward_op(
    grad: Tensor, x: Tensor, v: Tensor, y: Tensor, a_less_one: Tensor, b: Tensor, s: Tensor | None = None
) -> Tensor:
    return _backward(grad, x, v, y, a_less_one, b, s)


@_log_prob_backward_op.register_fake
def _(grad, x, v, y, a_less_one, b, s=None):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.rest = len(inputs) - 2


def _op_backward(ctx, grad):
    refuse_double_backward("log_prob")
    return None, _log_prob_backward_op(grad, *ctx.saved_tensors), *[None] * ctx.rest


_log_prob_op.register_autograd(_op_backward, setup_context=_setup_context)
