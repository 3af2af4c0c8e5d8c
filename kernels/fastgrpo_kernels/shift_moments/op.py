"""Public shift moments: CPU path, Triton launches, custom operators and gradient."""

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import check_traced, is_eager
from .._cpu import BlockSums, add_scaled, column, difference, quotient
from .._launch import arrivals, launch, launches
from .._noise_args import Noise, StoredStep
from .inputs import (
    Shift,
    check_shift,
    empty_gradients,
    guided,
    kernel_arguments,
    noise_of,
    shift_tiles,
    with_noise,
    with_rows,
)

Coefficient = float | Tensor


def shift_moments(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
) -> tuple[Tensor, Tensor]:
    """Moments P = mean(d·ε) and Q = mean(d²) of d = b·(v - v_old)/s over each sample's elements, float32 [B] each.

    log-ratio = P - Q/2, Gaussian KL = Q/2; with a reference model's output for `v_old`, Q/2 is the KL to it. `v` and
    `v_old` are [B, ...] of one shape and dtype (float32, bfloat16 or float16), any strides; `b` and `s` > 0 are floats
    or [B] float64/float32 (see `transitions`). `noise` is the `NoiseKey` the step was taken with, its ε as a tensor
    of v's shape, or the `StoredStep` (x, y, a) it was, of which ε = (y - a·x - b·v_old)/s. v == v_old bit for bit
    gives P = Q = 0. With `v_uncond` and `guidance_scale` (float or [B]), `v` is the conditional output and
    v_uncond + guidance_scale·(v - v_uncond), rounded to their dtype, takes its place; `v_old` is then the guided
    output of the rollout, as `gaussian_step` returns it.

    Differentiable once, in `v` and `v_uncond`: ∂P/∂v = b·ε/(s·D), ∂Q/∂v = 2·b·d/(s·D), in v's dtype; with guidance
    times guidance_scale for v and 1 - guidance_scale for v_uncond, straight through the rounding. The backward
    regenerates ε and keeps nothing of a latent's size but its inputs; the eager CPU path keeps ε, which is cheaper
    there. Raises ValueError or TypeError for mismatched shapes, dtypes or devices, s <= 0 or coefficients that are
    not finite (checked where reading them costs no device-to-host copy), a gradient asked of anything else, and a
    double backward.
    """
    shift = check_shift(v, v_old, b, s, noise, v_uncond, guidance_scale)
    if not is_eager(*shift.tensors):
        return _shift_moments_op(*with_rows(shift)[:-1])
    if torch.is_grad_enabled() and (v.requires_grad or (v_uncond is not None and v_uncond.requires_grad)):
        return _ShiftMoments.apply(*shift)  # pyright: ignore[reportReturnType]
    return _forward(shift)


def _forward(shift: Shift, *, kept: bool = True) -> tuple[Tensor, Tensor]:
    if launches(shift.v):
        P, Q, *_ = launch_shift_moments(shift, kept=kept)
        return P, Q
    return shift_moments_cpu(shift)


def _backward(grad_p: Tensor, grad_q: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    body = launch_shift_moments_backward if launches(shift.v) else shift_moments_backward_cpu
    return body(grad_p, grad_q, shift)


def shift_moments_cpu(shift: Shift) -> tuple[Tensor, Tensor]:
    """The ATen path: float32 sums in blocks, scaled once per sample in float64."""
    batch, elements = shift.v.shape[0], shift.v[0].numel()
    p, q = BlockSums(batch, elements), BlockSums(batch, elements)
    for tile, part in shift_tiles(shift):
        change = difference(guided(part), part.v_old)
        q.add(tile, change * change)
        p.add(tile, change.mul_(noise_of(part)))
    scale = quotient(shift.b, shift.s)
    P, Q = p.total() * (scale / elements), q.total() * (scale * scale / elements)
    return P.to(torch.float32), Q.to(torch.float32)


def reference_moment_cpu(shift: Shift) -> Tensor:
    """Q against the reference model's output, float32 [B]."""
    assert shift.v_reference is not None
    elements = shift.v[0].numel()
    sums = BlockSums(shift.v.shape[0], elements)
    for tile, part in shift_tiles(shift._replace(words=None)):
        assert part.v_reference is not None
        sums.add(tile, difference(guided(part), part.v_reference).square_())
    scale = quotient(shift.b, shift.s)
    return (sums.total() * (scale * scale / elements)).to(torch.float32)


def shift_moments_backward_cpu(
    grad_p: Tensor, grad_q: Tensor, shift: Shift, grad_reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of v and v_uncond in ATen, tile by tile."""
    scale = quotient(shift.b, shift.s)
    per_element = scale / shift.v[0].numel()
    by_change, by_noise = grad_q.double() * 2.0 * scale * per_element, grad_p.double() * per_element
    by_reference = None if grad_reference is None else grad_reference.double() * 2.0 * scale * per_element
    grad_v, grad_v_uncond = empty_gradients(shift)
    for tile, part in shift_tiles(shift):
        v = guided(part)
        grad = difference(v, part.v_old).mul_(column(by_change[tile[0]], v))
        add_scaled(grad, by_noise[tile[0]], noise_of(part))
        if part.v_reference is not None and by_reference is not None:
            add_scaled(grad, by_reference[tile[0]], difference(v, part.v_reference))
        if part.guidance is not None:
            guidance = column(part.guidance, v)
            grad_v_uncond.flatten(1)[tile] = grad * (1.0 - guidance)
            grad.mul_(guidance)
        grad_v.flatten(1)[tile] = grad
    return grad_v, grad_v_uncond


def launch_shift_moments(shift: Shift, *, kept: bool = True) -> tuple[Tensor, ...]:
    """The Triton path, one launch: (P, Q), and with a reference Q against it."""
    from .kernel import _shift_moments_fwd_kernel

    arguments, constants, programs = kernel_arguments(shift)
    batch, device = shift.v.shape[0], shift.v.device
    count = 2 if shift.v_reference is None else 3
    partials = torch.empty((count, programs), dtype=torch.float32, device=device)
    # Not parts of one tensor: results of a custom operator may not share their storage.
    moments = tuple(torch.empty(batch, dtype=torch.float32, device=device) for _ in range(count))
    reference = moments[2] if count == 3 else None
    outputs = *moments[:2], reference, partials, arrivals(batch, device, kept=kept)
    launch(_shift_moments_fwd_kernel, programs, device, *outputs, *arguments, **constants)
    return moments


def launch_shift_moments_backward(
    grad_p: Tensor,
    grad_q: Tensor,
    shift: Shift,
    grad_reference: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of v and v_uncond by Triton, one launch; `grad`, a scalar, multiplies the others."""
    from .kernel import _shift_moments_bwd_kernel

    arguments, constants, programs = kernel_arguments(shift)
    grad_v, grad_v_uncond = empty_gradients(shift)
    grads = [grad, grad_p.contiguous(), grad_q.contiguous(), grad_reference]
    launch(_shift_moments_bwd_kernel, programs, grad_v.device, grad_v, grad_v_uncond, *grads, *arguments, **constants)
    return grad_v, grad_v_uncond


def place(gradients: tuple[Tensor, Tensor], shift: Shift) -> list[Tensor | None]:
    """Gradients in the order of Shift's fields."""
    grads: list[Tensor | None] = [None] * len(Shift._fields)
    grads[0] = gradients[0]
    if shift.v_uncond is not None:
        grads[Shift._fields.index("v_uncond")] = gradients[1]
    return grads


class _ShiftMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        shift = Shift(*arguments)
        if not launches(shift.v):
            shift = with_noise(shift)
        save_arguments(ctx, shift)
        return _forward(shift)

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("shift_moments")
        shift = Shift(*saved_arguments(ctx))
        return tuple(place(_backward(grads[0], grads[1], shift), shift))


# Here and in the operators of grpo_loss `a` is Shift's a_less_one: Inductor's cache, which outlives an upgrade, holds
# code that names these arguments, and does not look at their schema.
@torch.library.custom_op("fastgrpo_kernels::shift_moments", mutates_args=())
def _shift_moments_op(
    v: Tensor,
    v_old: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    x: Tensor | None = None,
    y: Tensor | None = None,
    a: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_traced(a=a, b=b, s=s, guidance_scale=guidance)
    return _forward(Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance), kept=False)


@_shift_moments_op.register_fake
def _(v, *rest):
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
    x: Tensor | None = None,
    y: Tensor | None = None,
    a: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _backward(grad_p, grad_q, Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance))


@_shift_moments_backward_op.register_fake
def _(grad_p, grad_q, *arguments):
    return empty_gradients(Shift(*arguments))


def _setup_context(ctx, inputs, output):
    save_arguments(ctx, inputs)


def _op_backward(ctx, grad_p, grad_q):
    refuse_double_backward("shift_moments")
    arguments = saved_arguments(ctx)
    shift = Shift(*arguments)
    return tuple(place(_shift_moments_backward_op(grad_p, grad_q, *arguments), shift)[: len(arguments)])


_shift_moments_op.register_autograd(_op_backward, setup_context=_setup_context)
