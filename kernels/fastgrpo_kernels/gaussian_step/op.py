"""Public Gaussian step: checks, CPU path, Triton launch, custom operator and gradient."""

import torch
from torch import Tensor

from .._checks import LATENT_DTYPES, as_rows, check_latents, check_no_grad, is_eager, is_host_readable, per_sample
from .._launch import kernel_scalar, launch, rows
from .._noise_args import Noise, noise_cpu, split_noise
from ..noise import split_seed

Coefficient = float | Tensor


def gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Next latents y = a·x + b·v + s·ε, computed in float32, [B, ...] contiguous in `out_dtype` (default: x's).

    `x` and `v` are [B, ...] of 2 to 5 dimensions in float32, bfloat16 or float16 (each its own), any strides;
    `a`, `b`, `s` are floats or [B] float64/float32 (see `transitions`); `noise` is a `NoiseKey` of B rows, a tensor
    of x's shape, or None for a step without noise (s = 0). Differentiable once in x and v. On a GPU pass coefficients
    as floats or float32 to keep the call at one launch.

    Raises ValueError or TypeError for mismatched shapes, dtypes or devices, for coefficients that are not finite
    (checked where reading them costs no device-to-host copy), for s != 0 without noise, and for a double backward.
    """
    check_latents("x", x)
    check_latents("v", v, like=x)
    a, b, s = per_sample("a", a, x), per_sample("b", b, x), per_sample("s", s, x)
    check_no_grad(a=a, b=b, s=s)
    if noise is None:
        _check_noiseless(s)
    eps, words, seed = split_noise(noise, x)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in LATENT_DTYPES:
        raise TypeError(f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")
    if not is_eager(x, v, eps, words):
        return _gaussian_step_op(x, v, *as_rows((a, b, s), x), eps, words, seed, out_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or v.requires_grad):
        return _GaussianStep.apply(x, v, a, b, s, eps, words, seed, out_dtype)  # pyright: ignore[reportReturnType]
    return _forward(x, v, a, b, s, eps, words, seed, out_dtype)


def _check_noiseless(s: Coefficient) -> None:
    if isinstance(s, float) and s != 0.0:
        raise ValueError(f"noise: s = {s} needs noise; pass a NoiseKey or a tensor")
    if isinstance(s, Tensor) and is_host_readable(s) and bool(s.any()):
        raise ValueError("noise: s is not 0, so the step needs noise; pass a NoiseKey or a tensor")


def _forward(x, v, a, b, s, eps, words, seed, out_dtype) -> Tensor:
    body = gaussian_step_cpu if x.device.type == "cpu" else launch_gaussian_step
    return body(x, v, a, b, s, eps, words, seed, out_dtype)


def gaussian_step_cpu(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The ATen path: one buffer, one pass for each term."""
    y = torch.empty(x.shape, dtype=torch.float32)
    torch.mul(x.to(torch.float32), _column(a, x), out=y)
    _add_scaled(y, b, v.to(torch.float32))
    if eps is not None or words is not None:
        _add_scaled(y, s, noise_cpu(eps, words, seed, x))
    return y.to(out_dtype)


def launch_gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The Triton path: one launch."""
    from ..noise_kernel import BLOCK, NUM_WARPS
    from .kernel import _gaussian_step_kernel

    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    x, v = rows(x), rows(v)
    eps = None if eps is None else rows(eps)
    words = None if words is None else words.contiguous()
    a, b, s = kernel_scalar(a), kernel_scalar(b), kernel_scalar(s)
    blocks = -(-x.shape[1] // BLOCK)
    launch(
        _gaussian_step_kernel,
        x.shape[0] * blocks,
        y,
        x,
        v,
        a,
        b,
        s,
        eps,
        words,
        *split_seed(seed),
        x.stride(0),
        v.stride(0),
        0 if eps is None else eps.stride(0),
        x.shape[1],
        blocks,
        A_PER_ROW=isinstance(a, Tensor),
        B_PER_ROW=isinstance(b, Tensor),
        S_PER_ROW=isinstance(s, Tensor),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return y


def _column(coefficient: Coefficient, like: Tensor) -> Coefficient:
    if not isinstance(coefficient, Tensor):
        return coefficient
    return coefficient.to(torch.float32).view(-1, *[1] * (like.ndim - 1))


def _add_scaled(y: Tensor, coefficient: Coefficient, term: Tensor) -> None:
    column = _column(coefficient, y)
    if isinstance(column, Tensor):
        y.addcmul_(term, column)
    else:
        y.add_(term, alpha=column)


class _GaussianStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, a, b, s, eps, words, seed, out_dtype):
        ctx.a, ctx.b, ctx.dtypes = a, b, (x.dtype, v.dtype)
        return _forward(x, v, a, b, s, eps, words, seed, out_dtype)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise ValueError("gaussian_step: has no double backward; call backward without create_graph=True")
        return *_gradients(ctx, grads[0]), *[None] * 7


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    gradients = []
    for needed, coefficient, dtype in zip(ctx.needs_input_grad, (ctx.a, ctx.b), ctx.dtypes, strict=False):
        scaled = grad.to(torch.float32) * _column(coefficient, grad) if needed else None
        gradients.append(None if scaled is None else scaled.to(dtype))
    return tuple(gradients)


@torch.library.custom_op("fastgrpo_kernels::gaussian_step", mutates_args=())
def _gaussian_step_op(
    x: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return _forward(x, v, a, b, s, eps, words, seed, out_dtype)


@_gaussian_step_op.register_fake
def _(x, v, a, b, s, eps, words, seed, out_dtype):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, v, a, b, *_ = inputs
    ctx.save_for_backward(a, b)
    ctx.dtypes = (x.dtype, v.dtype)


def _op_backward(ctx, grad):
    ctx.a, ctx.b = ctx.saved_tensors
    return *_gradients(ctx, grad), *[None] * 7


_gaussian_step_op.register_autograd(_op_backward, setup_context=_setup_context)
