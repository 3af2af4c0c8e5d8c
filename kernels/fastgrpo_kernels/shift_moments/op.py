"""Public shift moments: CPU path, Triton launches, custom operators and gradient."""

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import is_eager
from .._cpu import add_scaled, column, difference, quotient, sum_blocks
from .._launch import launch
from .._noise_args import Noise, StoredStep
from .inputs import Shift, check_shift, empty_gradients, guided, kernel_arguments, with_noise, with_rows

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


def _forward(shift: Shift) -> tuple[Tensor, Tensor]:
    return (shift_moments_cpu if shift.v.device.type == "cpu" else launch_shift_moments)(shift)


def _backward(grad_p: Tensor, grad_q: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    body = shift_moments_backward_cpu if shift.v.device.type == "cpu" else launch_shift_moments_backward
    return body(grad_p, grad_q, shift)


def shift_moments_cpu(shift: Shift) -> tuple[Tensor, Tensor]:
    """The ATen path: float32 sums in blocks, scaled once per sample in float64."""
    eps = with_noise(shift).eps
    assert eps is not None
    change = difference(guided(shift), shift.v_old).flatten(1)
    scale, elements = quotient(shift.b, shift.s), change.shape[1]
    q = sum_blocks(change * change) * (scale * scale / elements)
    p = sum_blocks(change.mul_(eps.flatten(1))) * (scale / elements)
    return p.to(torch.float32), q.to(torch.float32)


def reference_moment_cpu(shift: Shift) -> Tensor:
    """Q against the reference model's output, float32 [B]."""
    assert shift.v_reference is not None
    change = difference(guided(shift), shift.v_reference).flatten(1)
    scale = quotient(shift.b, shift.s)
    return (sum_blocks(change.square_()) * (scale * scale / change.shape[1])).to(torch.float32)


def shift_moments_backward_cpu(
    grad_p: Tensor, grad_q: Tensor, shift: Shift, grad_reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of v and v_uncond in ATen: one buffer, one pass for each term."""
    eps, v = with_noise(shift).eps, guided(shift)
    assert eps is not None
    scale = quotient(shift.b, shift.s)
    per_element = scale / v[0].numel()
    grad = difference(v, shift.v_old).mul_(column(grad_q.double() * 2.0 * scale * per_element, v))
    add_scaled(grad, grad_p.double() * per_element, eps.to(torch.float32))
    if shift.v_reference is not None and grad_reference is not None:
        add_scaled(grad, grad_reference.double() * 2.0 * scale * per_element, difference(v, shift.v_reference))
    if shift.guidance is None:
        return grad.to(v.dtype), grad.new_empty(0, dtype=v.dtype)
    uncond = (grad * (1.0 - column(shift.guidance, v))).to(v.dtype)
    return grad.mul_(column(shift.guidance, v)).to(v.dtype), uncond


def launch_partials(shift: Shift) -> Tensor:
    """Sums of (v - v_old)·ε, (v - v_old)² and, with a reference, (v - v_reference)² of each block; one launch."""
    from .kernel import _shift_moments_fwd_kernel

    arguments, constants, programs = kernel_arguments(shift)
    batch = shift.v.shape[0]
    slots = 2 if shift.v_reference is None else 3
    partials = torch.empty((batch, programs // batch, slots), dtype=torch.float32, device=shift.v.device)
    launch(_shift_moments_fwd_kernel, programs, partials, *arguments, **constants)
    return partials


def launch_shift_moments(shift: Shift) -> tuple[Tensor, Tensor]:
    """The Triton path: partial sums to their own slots, then one program to a row adds them in fixed order."""
    from .._launch import kernel_scalar
    from .kernel import _shift_moments_sum_kernel

    partials = launch_partials(shift)
    batch, blocks, _ = partials.shape
    p, q = torch.empty((2, batch), dtype=torch.float32, device=shift.v.device).unbind(0)
    b, s = kernel_scalar(shift.b), kernel_scalar(shift.s)
    constants = {"B_PER_ROW": isinstance(b, Tensor), "S_PER_ROW": isinstance(s, Tensor), "TILE": 1024, "num_warps": 4}
    elements = shift.v[0].numel()
    launch(_shift_moments_sum_kernel, batch, p, q, partials, b, s, elements, blocks, **constants)
    return p, q


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
    launch(_shift_moments_bwd_kernel, programs, grad_v, grad_v_uncond, *grads, *arguments, **constants)
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
        if shift.v.device.type == "cpu":
            shift = with_noise(shift)
        save_arguments(ctx, shift)
        return _forward(shift)

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("shift_moments")
        shift = Shift(*saved_arguments(ctx))
        return tuple(place(_backward(grads[0], grads[1], shift), shift))


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
    return _forward(Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance))


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
