"""The whole loss from latents: shift moments and objective in two launches forward, one backward."""

from typing import Literal

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import check_traced, is_eager
from .._launch import launches
from .._noise_args import Noise, StoredStep
from ..shift_moments.inputs import Shift, check_shift, empty_gradients, with_noise, with_rows
from ..shift_moments.op import (
    launch_shift_moments,
    launch_shift_moments_backward,
    place,
    reference_moment_cpu,
    shift_moments_backward_cpu,
    shift_moments_cpu,
)
from .op import LossStatistics, Objective, Ratio, check_objective, check_rows, clipped_loss_cpu, launch_clipped_loss

Coefficient = float | Tensor


def grpo_loss(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep,
    advantage: Tensor,
    weight: Coefficient,
    *,
    clip_low: float,
    clip_high: float,
    ratio: Ratio = "gaussian",
    dual_clip: float | None = None,
    dppo_threshold: float | None = None,
    kl_weight: float = 0.0,
    v_reference: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, LossStatistics]:
    """clipped_loss(*shift_moments(v, v_old, b, s, noise), s, advantage, weight, …) in two launches and one backward.

    Latents, coefficients, noise and guidance are those of `shift_moments`, the objective that of `clipped_loss`;
    `v_reference` [B, ...] of v's dtype is the reference model's (guided) output for the KL term, read in the same pass.
    Returns the weighted sum over samples, a float32 scalar, and its statistics.

    Differentiable once, in `v` and `v_uncond`. Nothing of a latent's size is kept besides the inputs (the eager CPU
    path keeps ε). Raises as the two operations do.
    """
    shift = check_shift(v, v_old, b, s, noise, v_uncond, guidance_scale, v_reference)
    elements = v[0].numel()
    objective = check_objective(clip_low, clip_high, ratio, dual_clip, dppo_threshold, kl_weight, reduction, elements)
    if kl_weight != 0.0 and v_reference is None:
        raise ValueError("kl_weight: needs v_reference, the reference model's output")
    _, advantage, weight = check_rows(s, advantage, weight, v)
    if not is_eager(*shift.tensors, advantage):
        shift = with_rows(shift)
        weight = weight if isinstance(weight, Tensor) else advantage.new_full((v.shape[0],), weight)
        loss, statistics, _ = _grpo_loss_op(advantage, weight, *objective, *shift)
    elif torch.is_grad_enabled() and (v.requires_grad or (v_uncond is not None and v_uncond.requires_grad)):
        loss, statistics = _GrpoLoss.apply(advantage, weight, objective, *shift)  # pyright: ignore
    else:
        loss, statistics, _ = _forward(advantage, weight, objective, shift)
    return loss, LossStatistics(*statistics.detach().unbind(0))


def _forward(
    advantage: Tensor, weight: Coefficient, objective: Objective, shift: Shift, *, kept: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, statistics, gradient factors) of latents on the CPU or on a device."""
    if launches(shift.v):
        return launch_grpo_loss(advantage, weight, objective, shift, kept=kept)
    reference = None if shift.v_reference is None else reference_moment_cpu(shift)
    return clipped_loss_cpu(*shift_moments_cpu(shift), shift.s, advantage, weight, reference, objective)


def launch_grpo_loss(
    advantage: Tensor, weight: Coefficient, objective: Objective, shift: Shift, *, kept: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton path: one launch over the latents, one over the samples."""
    P, Q, *reference = launch_shift_moments(shift, kept=kept)
    Q_reference = reference[0] if reference else None
    return launch_clipped_loss(P, Q, shift.s, advantage, weight, Q_reference, objective)


def _backward(grad: Tensor, factors: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    grad_p, grad_q, *rest = factors.unbind(0)
    grad_reference = rest[0] if rest else None
    if launches(shift.v):
        return launch_shift_moments_backward(grad_p, grad_q, shift, grad_reference, grad.contiguous())
    scaled = None if grad_reference is None else grad * grad_reference
    return shift_moments_backward_cpu(grad * grad_p, grad * grad_q, shift, scaled)


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, advantage, weight, objective, *arguments):
        shift = Shift(*arguments)
        if not launches(shift.v):
            shift = with_noise(shift)
        loss, statistics, factors = _forward(advantage, weight, objective, shift)
        save_arguments(ctx, (factors, *shift))
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("grpo_loss")
        factors, *arguments = saved_arguments(ctx)
        shift = Shift(*arguments)
        return None, None, None, *place(_backward(grads[0], factors, shift), shift)


@torch.library.custom_op("fastgrpo_kernels::grpo_loss", mutates_args=())
def _grpo_loss_op(
    advantage: Tensor,
    weight: Tensor,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    dppo_threshold: float | None,
    kl_weight: float,
    unit: float,
    v: Tensor,
    v_old: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None = None,
    words: Tensor | None = None,
    seed: int = 0,
    x: Tensor | None = None,
    y: Tensor | None = None,
    a: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    v_reference: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_traced(a=a, b=b, s=s, guidance_scale=guidance, advantage=advantage, weight=weight)
    objective = Objective(ratio, clip_low, clip_high, dual_clip, dppo_threshold, kl_weight, unit)
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, v_reference)
    return _forward(advantage, weight, objective, shift, kept=False)


@_grpo_loss_op.register_fake
def _(advantage, weight, *arguments):
    shift = Shift(*arguments[len(Objective._fields) :])
    batch, empty = shift.v.shape[0], shift.v.new_empty
    size = 2 if shift.v_reference is None else 3
    statistics = empty(len(LossStatistics._fields), dtype=torch.float32)
    return empty((), dtype=torch.float32), statistics, empty((size, batch), dtype=torch.float32)


@torch.library.custom_op("fastgrpo_kernels::grpo_loss_backward", mutates_args=())
def _grpo_loss_backward_op(
    grad: Tensor,
    factors: Tensor,
    v: Tensor,
    v_old: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None = None,
    words: Tensor | None = None,
    seed: int = 0,
    x: Tensor | None = None,
    y: Tensor | None = None,
    a: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    v_reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, v_reference)
    return _backward(grad, factors, shift)


@_grpo_loss_backward_op.register_fake
def _(grad, factors, *arguments):
    return empty_gradients(Shift(*arguments))


def _setup_context(ctx, inputs, output):
    save_arguments(ctx, (output[2], *inputs[2 + len(Objective._fields) :]))


def _op_backward(ctx, grad, *unused):
    refuse_double_backward("grpo_loss")
    factors, *arguments = saved_arguments(ctx)
    gradients = place(_grpo_loss_backward_op(grad, factors, *arguments), Shift(*arguments))
    return *[None] * (2 + len(Objective._fields)), *gradients


_grpo_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
