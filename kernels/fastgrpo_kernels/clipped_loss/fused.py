"""The whole loss from latents: shift moments and objective in one launch forward, one backward."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import as_rows, check_number, check_traced, elements_of, is_eager, replaced
from .._launch import arrivals, is_traced_plainly, launch, launches
from .._noise_args import MatchingTarget, Noise, StoredStep
from ..shift_moments.inputs import Shift, check_shift, empty_gradients, kernel_arguments, with_noise, with_rows
from ..shift_moments.op import (
    launch_shift_moments_backward,
    moments_cpu,
    moments_traced,
    place,
    shift_moments_backward_cpu,
    slots,
)
from .op import (
    MATCHING,
    LossStatistics,
    Objective,
    Ratio,
    Statistics,
    check_objective,
    check_rows,
    clipped_loss_cpu,
    computed,
    empty_outputs,
    objective_arguments,
)

Coefficient = float | Tensor


def grpo_loss(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep | MatchingTarget,
    advantages: Tensor,
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
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    per_sample: bool = False,
) -> tuple[Tensor, LossStatistics]:
    """The policy loss of visual GRPO from model outputs, in one launch forward and one backward.

    The same as clipped_loss(*shift_moments(v, v_old, b, s, noise), s, advantages, weight, …). Nothing of a latent's
    size is kept besides the inputs (the eager CPU path keeps ε).

    Args:
        v, v_old, b, s, noise, v_uncond, guidance_scale, mask: those of `shift_moments`; `v` and `v_uncond` are
            differentiable. With reduction "sum" a mask's sums are over the elements that count. A MatchingTarget goes
            with the ratios "matching" and "huber", for which b = s = the weight of the log-ratio.
        advantages: float32 or float64 [B], or [B, R] for R clipped losses that are summed.
        weight: weight of each sample, a float or [B]; 0 for padding, whose gradient is 0 if its latents are finite.
        clip_low, clip_high, ratio, dual_clip, dppo_threshold, reduction, per_sample: those of `clipped_loss`.
        kl_weight: kl_weight·Q_reference/2 is added to a sample's loss, the Gaussian KL to the reference model.
        v_reference: the reference model's (guided) output [B, ...], read in the same pass; needed for a kl_weight.

    Returns:
        The weighted sum of the samples' losses, a float32 scalar (or their losses [B], `per_sample`), differentiable
        once, and its statistics.

    Raises:
        ValueError, TypeError: as the two operations do.
    """
    shift = check_shift(v, v_old, b, s, noise, v_uncond, guidance_scale, v_reference, mask)
    elements = elements_of(v) if reduction == "sum" else None
    objective = check_objective(clip_low, clip_high, ratio, dual_clip, dppo_threshold, kl_weight, reduction, elements)
    if (ratio in MATCHING) != isinstance(noise, MatchingTarget):
        raise ValueError(f"ratio: {ratio!r} does not go with a {type(noise).__name__} for noise; {_REMEDY}")
    if ratio == "huber":
        shift = replaced(shift, residuals=0.0)
    return _loss_of(shift, objective, advantages, weight, per_sample)


_REMEDY = 'a MatchingTarget takes "matching" or "huber", what a step was taken with the others'


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    t: Coefficient,
    target: MatchingTarget,
    advantages: Tensor,
    weight: Coefficient,
    *,
    beta: float,
    advantage_clip: float,
    kl_weight: float = 0.0,
    v_reference: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    mask: Tensor | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, LossStatistics]:
    """The policy loss of DiffusionNFT (arXiv 2509.16117) for velocities, in one launch forward and one backward.

    With the branches v± = v_old ± β·(v - v_old), the target u, and r = clip(A, ±c)/(2c) + ½ a sample's loss is

        c/β·(r·mean(t²·(v+ - u)²)/w+ + (1 - r)·mean(t²·(v- - u)²)/w-),    w± = max(mean|t·(v± - u)|, 1e-5), detached

    Args:
        v: the policy's output [B, ...]; differentiable.
        v_old: the old policy's output, likewise.
        t: time of each sample in (0, 1], a float or [B]: x_t = (1-t)·x̂0 + t·ε.
        target: MatchingTarget(x̂0, key of ε).
        advantages: float32 or float64 [B], or [B, R] for R losses that are summed.
        weight: weight of each sample, a float or [B]; 0 for padding, whose gradient is 0 if its latents are finite.
        beta: β, greater than 0.
        advantage_clip: c, greater than 0.
        kl_weight: kl_weight·mean((v - v_reference)²)/2 is added to a sample's loss.
        v_reference: the reference model's (guided) output [B, ...]; needed for a kl_weight.
        v_uncond, guidance_scale, mask: those of `shift_moments`.
        per_sample: return the samples' weighted losses [B] instead of their sum.

    Returns:
        The weighted sum of the samples' losses, a float32 scalar, or [B], differentiable once, and its statistics: kl
        is mean((v - v_old)²)/2, or that to the reference; `ratio` is exp(-t²·(M - M_old)), with M and M_old the mean
        squared distances of v and v_old from u; `clipped` counts samples whose advantage was clipped.

    Raises:
        ValueError, TypeError: as `grpo_loss` does.
    """
    beta, advantage_clip = check_number("beta", beta), check_number("advantage_clip", advantage_clip)
    for name, value in (("beta", beta), ("advantage_clip", advantage_clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be greater than 0, got {value}")
    if not isinstance(target, MatchingTarget):
        raise TypeError(f"target: expected a MatchingTarget, got {type(target).__name__}")
    shift = check_shift(v, v_old, t, t, target, v_uncond, guidance_scale, v_reference, mask, beta)
    checked = check_objective(0.0, 0.0, "matching", None, None, kl_weight, "mean", None)
    objective = Objective("nft", advantage_clip, advantage_clip, None, None, checked.kl_weight, 1.0)
    return _loss_of(shift, objective, advantages, weight, per_sample)


def _loss_of(
    shift: Shift, objective: Objective, advantages: Tensor, weight: Coefficient, per_sample: bool
) -> tuple[Tensor, LossStatistics]:
    """The loss of checked latents and objective, by whichever path runs."""
    v, v_uncond = shift.v, shift.v_uncond
    if objective.kl_weight != 0.0 and shift.v_reference is None:
        raise ValueError("kl_weight: needs v_reference, the reference model's output")
    advantages, weight = check_rows(advantages, weight, v)
    if is_traced_plainly(v):
        P, Q, Q_reference, share, rest = moments_traced(shift, mean_of_masked=objective.unit == 1.0)
        step = shift.s if not isinstance(shift.s, Tensor) else torch.where(shift.s > 0, shift.s, torch.nan)
        loss, sums, _ = clipped_loss_cpu(
            P, Q, step, advantages, weight, Q_reference, objective, per_sample, share, rest, shift.residuals
        )
        statistics = sums().detach()
    elif not is_eager(*shift.tensors(), advantages):
        (weight,) = as_rows((weight,), v)
        loss, statistics, _ = _grpo_loss_op(advantages, weight, *objective, per_sample, *with_rows(shift))
        statistics = statistics.detach()
    elif torch.is_grad_enabled() and (v.requires_grad or (v_uncond is not None and v_uncond.requires_grad)):
        kept: list[Statistics] = []
        loss = _GrpoLoss.apply(v, v_uncond, (advantages, weight, objective, per_sample), shift, kept)
        (statistics,) = kept
    else:
        loss, statistics, _ = _forward(advantages, weight, objective, per_sample, shift)
    return loss, LossStatistics(statistics)


def _forward(
    advantages: Tensor, weight: Coefficient, objective: Objective, per_sample: bool, shift: Shift
) -> tuple[Tensor, Statistics, Sequence[Tensor]]:
    """(loss, statistics, gradient factors of [B] each) of latents on the CPU or on a device."""
    if launches(shift.v):
        loss, statistics, factors = launch_grpo_loss(advantages, weight, objective, per_sample, shift, kept=True)
        return loss, statistics, factors.unbind(0)
    P, Q, Q_reference, share, rest = moments_cpu(shift, mean_of_masked=objective.unit == 1.0)
    moments = P, Q, shift.s, advantages, weight, Q_reference
    return clipped_loss_cpu(*moments, objective, per_sample, share, rest, shift.residuals)


def launch_grpo_loss(
    advantages: Tensor, weight: Coefficient, objective: Objective, per_sample: bool, shift: Shift, *, kept: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton path: one launch."""
    from .kernel import _grpo_loss_fwd_kernel

    batch, device, has_reference = shift.v.shape[0], shift.v.device, shift.v_reference is not None
    loss, outputs = empty_outputs(batch, device, 2, has_reference, per_sample)
    rows, constants = objective_arguments(objective, advantages, weight, batch)
    arguments, latents, programs = kernel_arguments(shift)
    count = slots(shift)
    workspace = torch.empty(count * (programs + batch), dtype=torch.float32, device=device)
    launch(
        _grpo_loss_fwd_kernel,
        programs,
        device,
        *(*outputs, *rows, workspace, arrivals(batch + 1, device, kept=kept), *arguments),
        **constants,
        **latents,
        SLOTS=count,
        MEAN_OF_MASKED=shift.mask is not None and objective.unit == 1.0,
    )
    return loss, outputs[2], outputs[3]


def _backward(grad: Tensor, factors: Sequence[Tensor], shift: Shift) -> tuple[Tensor, Tensor]:
    if launches(shift.v):
        grad_p, grad_q, *rest = factors
        return launch_shift_moments_backward(grad_p, grad_q, shift, rest[0] if rest else None, grad)
    grad_p, grad_q, *rest = (grad * factor for factor in factors)
    return shift_moments_backward_cpu(grad_p, grad_q, shift, rest[0] if rest else None)


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, v_uncond, rows, shift, kept):
        # What is differentiated stands alone: autograd's time is that of its arguments.
        if not launches(shift.v):
            shift = with_noise(shift)
        loss, statistics, factors = _forward(*rows, shift=shift)
        kept.append(statistics)
        save_arguments(ctx, (*shift, *factors))
        return loss

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("grpo_loss")
        arguments = saved_arguments(ctx)
        shift = Shift(*arguments[: len(Shift._fields)])
        grad, grad_uncond = _backward(grads[0], arguments[len(Shift._fields) :], shift)
        return grad, None if shift.v_uncond is None else grad_uncond, None, None, None


@torch.library.custom_op("fastgrpo_kernels::grpo_loss", mutates_args=())
def _grpo_loss_op(
    advantages: Tensor,
    weight: Tensor,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    dppo_threshold: float | None,
    kl_weight: float,
    unit: float,
    per_sample: bool,
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
    mask: Tensor | None = None,
    inner: int = 1,
    x0: Tensor | None = None,
    noise_scale: Tensor | None = None,
    x0_scale: Tensor | None = None,
    residuals: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_traced(a=a, b=b, s=s, guidance_scale=guidance, advantages=advantages, weight=weight)
    check_traced(noise_scale=noise_scale, x0_scale=x0_scale)
    target = x0, noise_scale, x0_scale, residuals
    objective = Objective(ratio, clip_low, clip_high, dual_clip, dppo_threshold, kl_weight, unit)
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, v_reference, mask, inner, *target)
    if launches(v):
        return launch_grpo_loss(advantages, weight, objective, per_sample, shift, kept=False)
    loss, statistics, factors = _forward(advantages, weight, objective, per_sample, shift)
    return loss, computed(statistics), torch.stack(list(factors))


@_grpo_loss_op.register_fake
def _(advantages, weight, *arguments):
    per_sample, *rest = arguments[len(Objective._fields) :]
    shift = Shift(*rest)
    loss, outputs = empty_outputs(shift.v.shape[0], shift.v.device, 2, shift.v_reference is not None, per_sample)
    return loss, outputs[2], outputs[3]


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
    mask: Tensor | None = None,
    inner: int = 1,
    x0: Tensor | None = None,
    noise_scale: Tensor | None = None,
    x0_scale: Tensor | None = None,
    residuals: float | None = None,
) -> tuple[Tensor, Tensor]:
    target = x0, noise_scale, x0_scale, residuals
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, v_reference, mask, inner, *target)
    return _backward(grad, factors.unbind(0), shift)


@_grpo_loss_backward_op.register_fake
def _(grad, factors, *arguments):
    return empty_gradients(Shift(*arguments))


def _setup_context(ctx, inputs, output):
    save_arguments(ctx, (output[2], *inputs[3 + len(Objective._fields) :]))


def _op_backward(ctx, grad, *unused):
    refuse_double_backward("grpo_loss")
    factors, *arguments = saved_arguments(ctx)
    gradients = place(_grpo_loss_backward_op(grad, factors, *arguments), Shift(*arguments))
    return *[None] * (3 + len(Objective._fields)), *gradients[: len(arguments)]


_grpo_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
