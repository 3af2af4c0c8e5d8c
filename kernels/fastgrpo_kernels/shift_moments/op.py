"""Public shift moments: checks, CPU path, Triton launches, custom operators and gradient."""

import torch
from torch import Tensor

from .._checks import as_rows, check_latents, check_no_grad, is_eager, per_sample
from .._launch import kernel_scalar, launch, rows
from .._noise_args import Noise, noise_cpu, split_noise
from ..noise import split_seed

Coefficient = float | Tensor

# Elements to a partial sum on the CPU; below ATen's parallel grain, so that bits depend on neither batch nor threads.
_CPU_BLOCK = 4096


def shift_moments(v: Tensor, v_old: Tensor, b: Coefficient, s: Coefficient, noise: Noise) -> tuple[Tensor, Tensor]:
    """Moments P = mean(d·ε) and Q = mean(d²) of d = b·(v - v_old)/s over each sample's elements, float32 [B] each.

    log-ratio = P - Q/2, Gaussian KL = Q/2. `v` and `v_old` are [B, ...] of one shape and dtype (float32, bfloat16 or
    float16), any strides; `b` and `s` > 0 are floats or [B] float64/float32 (see `transitions`); `noise` is the
    `NoiseKey` the step was taken with, or its ε as a tensor of v's shape. v == v_old bit for bit gives P = Q = 0.

    Differentiable once, in `v` alone: ∂P/∂v = b·ε/(s·D), ∂Q/∂v = 2·b·d/(s·D), in v's dtype. The backward regenerates
    ε from the key and keeps nothing of a latent's size but its inputs; the eager CPU path keeps ε, which is cheaper
    there. Raises ValueError or TypeError for mismatched shapes, dtypes or devices, s <= 0 or coefficients that are
    not finite (checked where reading them costs no device-to-host copy), a gradient asked of `v_old`, `b`, `s` or
    the noise, and a double backward.
    """
    check_latents("v", v)
    check_latents("v_old", v_old, like=v, same_dtype=True)
    b, s = per_sample("b", b, v), per_sample("s", s, v, positive=True)
    check_no_grad(v_old=v_old, b=b, s=s)
    if noise is None:
        raise TypeError("noise: expected the step's NoiseKey or its noise tensor, got None")
    eps, words, seed = split_noise(noise, v)
    if not is_eager(v, v_old, eps, words):
        return _shift_moments_op(v, v_old, *as_rows((b, s), v), eps, words, seed)
    if torch.is_grad_enabled() and v.requires_grad:
        return _ShiftMoments.apply(v, v_old, b, s, eps, words, seed)  # pyright: ignore[reportReturnType]
    return _forward(v, v_old, b, s, eps, words, seed)


def _forward(v, v_old, b, s, eps, words, seed) -> tuple[Tensor, Tensor]:
    body = shift_moments_cpu if v.device.type == "cpu" else launch_shift_moments
    return body(v, v_old, b, s, eps, words, seed)


def _backward(grad_p, grad_q, v, v_old, b, s, eps, words, seed) -> Tensor:
    body = shift_moments_backward_cpu if v.device.type == "cpu" else launch_shift_moments_backward
    return body(grad_p, grad_q, v, v_old, b, s, eps, words, seed)


def shift_moments_cpu(
    v: Tensor, v_old: Tensor, b: Coefficient, s: Coefficient, eps: Tensor | None, words: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The ATen path: float32 sums in blocks, scaled once per sample in float64."""
    shift = _shift(v, v_old).flatten(1)
    scale, elements = _scale(b, s), shift.shape[1]
    q = _sum_blocks(shift * shift) * (scale * scale / elements)
    p = _sum_blocks(shift.mul_(noise_cpu(eps, words, seed, v).flatten(1))) * (scale / elements)
    return p.to(torch.float32), q.to(torch.float32)


def shift_moments_backward_cpu(
    grad_p: Tensor,
    grad_q: Tensor,
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
) -> Tensor:
    """Gradient of v in ATen: one buffer, one pass for each term."""
    column = [-1] + [1] * (v.ndim - 1)
    scale = _scale(b, s) / v[0].numel()
    factor_eps = (grad_p.double() * scale).to(torch.float32).view(column)
    factor_shift = (grad_q.double() * 2.0 * scale * _scale(b, s)).to(torch.float32).view(column)
    grad = _shift(v, v_old).mul_(factor_shift)
    return grad.addcmul_(noise_cpu(eps, words, seed, v), factor_eps).to(v.dtype)


def launch_shift_moments(
    v: Tensor, v_old: Tensor, b: Coefficient, s: Coefficient, eps: Tensor | None, words: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The Triton path: partial sums to their own slots, then one program to a row adds them in fixed order."""
    from ..noise_kernel import BLOCK, NUM_WARPS
    from .kernel import _shift_moments_fwd_kernel, _shift_moments_sum_kernel

    v, v_old, eps, words = _kernel_inputs(v, v_old, eps, words)
    batch, elements = v.shape
    blocks = -(-elements // BLOCK)
    partials = torch.empty((batch, blocks, 2), dtype=torch.float32, device=v.device)
    p, q = torch.empty((2, batch), dtype=torch.float32, device=v.device).unbind(0)
    launch(
        _shift_moments_fwd_kernel,
        batch * blocks,
        partials,
        v,
        v_old,
        eps,
        words,
        *split_seed(seed),
        *_strides(v, v_old, eps),
        elements,
        blocks,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    b, s = kernel_scalar(b), kernel_scalar(s)
    launch(
        _shift_moments_sum_kernel,
        batch,
        p,
        q,
        partials,
        b,
        s,
        elements,
        blocks,
        B_PER_ROW=isinstance(b, Tensor),
        S_PER_ROW=isinstance(s, Tensor),
        TILE=1024,
        num_warps=NUM_WARPS,
    )
    return p, q


def launch_shift_moments_backward(
    grad_p: Tensor,
    grad_q: Tensor,
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
) -> Tensor:
    """Gradient of v by Triton: one launch."""
    from ..noise_kernel import BLOCK, NUM_WARPS
    from .kernel import _shift_moments_bwd_kernel

    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    v, v_old, eps, words = _kernel_inputs(v, v_old, eps, words)
    batch, elements = v.shape
    blocks = -(-elements // BLOCK)
    b, s = kernel_scalar(b), kernel_scalar(s)
    launch(
        _shift_moments_bwd_kernel,
        batch * blocks,
        grad_v,
        grad_p.contiguous(),
        grad_q.contiguous(),
        v,
        v_old,
        b,
        s,
        eps,
        words,
        *split_seed(seed),
        *_strides(v, v_old, eps),
        elements,
        blocks,
        B_PER_ROW=isinstance(b, Tensor),
        S_PER_ROW=isinstance(s, Tensor),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad_v


def _kernel_inputs(v: Tensor, v_old: Tensor, eps: Tensor | None, words: Tensor | None):
    return rows(v), rows(v_old), None if eps is None else rows(eps), None if words is None else words.contiguous()


def _strides(v: Tensor, v_old: Tensor, eps: Tensor | None) -> tuple[int, int, int]:
    return v.stride(0), v_old.stride(0), 0 if eps is None else eps.stride(0)


def _shift(v: Tensor, v_old: Tensor) -> Tensor:
    """v - v_old as a new contiguous float32 tensor."""
    shift = torch.empty(v.shape, dtype=torch.float32)
    if v.dtype == torch.float32:
        return torch.sub(v, v_old, out=shift)
    return shift.copy_(v).sub_(v_old)


def _scale(b: Coefficient, s: Coefficient) -> float | Tensor:
    """b/s in float64."""
    b = b.double() if isinstance(b, Tensor) else b
    return b / (s.double() if isinstance(s, Tensor) else s)


def _sum_blocks(values: Tensor) -> Tensor:
    """Sum over dim 1 of [B, D], float64 [B]: partial sums of fixed blocks, so that a row's bits are its own."""
    elements = values.shape[1]
    whole = elements - elements % _CPU_BLOCK
    total = values[:, whole:].sum(1).double()
    if whole:
        total += values[:, :whole].unflatten(1, (-1, _CPU_BLOCK)).sum(2).sum(1, dtype=torch.float64)
    return total


class _ShiftMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, v_old, b, s, eps, words, seed):
        if v.device.type == "cpu" and words is not None:
            eps, words = noise_cpu(None, words, seed, v), None
        tensors = [t if isinstance(t, Tensor) else None for t in (b, s)]
        ctx.save_for_backward(v, v_old, eps, words, *tensors)
        ctx.floats, ctx.seed = [None if isinstance(c, Tensor) else c for c in (b, s)], seed
        return _forward(v, v_old, b, s, eps, words, seed)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise ValueError("shift_moments: has no double backward; call backward without create_graph=True")
        v, v_old, eps, words, *tensors = ctx.saved_tensors
        b, s = (t if f is None else f for t, f in zip(tensors, ctx.floats, strict=True))
        grad_p, grad_q = grads
        return _backward(grad_p, grad_q, v, v_old, b, s, eps, words, ctx.seed), *[None] * 6


@torch.library.custom_op("fastgrpo_kernels::shift_moments", mutates_args=())
def _shift_moments_op(
    v: Tensor, v_old: Tensor, b: Tensor, s: Tensor, eps: Tensor | None, words: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    return _forward(v, v_old, b, s, eps, words, seed)


@_shift_moments_op.register_fake
def _(v, v_old, b, s, eps, words, seed):
    return v.new_empty(v.shape[0], dtype=torch.float32), v.new_empty(v.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastgrpo_kernels::shift_moments_backward", mutates_args=())
def _shift_moments_backward_op(
    grad_p: Tensor,
    grad_q: Tensor,
    v: Tensor,
    v_old: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
) -> Tensor:
    return _backward(grad_p, grad_q, v, v_old, b, s, eps, words, seed)


@_shift_moments_backward_op.register_fake
def _(grad_p, grad_q, v, v_old, b, s, eps, words, seed):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.seed = inputs
    ctx.save_for_backward(*tensors)


def _op_backward(ctx, grad_p, grad_q):
    return _shift_moments_backward_op(grad_p, grad_q, *ctx.saved_tensors, ctx.seed), *[None] * 6


_shift_moments_op.register_autograd(_op_backward, setup_context=_setup_context)
