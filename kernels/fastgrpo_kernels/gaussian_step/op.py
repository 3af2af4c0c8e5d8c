"""Public Gaussian step: checks, custom operator and gradient."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import (
    as_rows,
    check_dtype,
    check_guidance,
    check_latents,
    check_no_grad,
    check_traced,
    is_eager,
    is_host_readable,
    per_sample,
    replaced,
)
from .._cpu import column
from .._launch import launches
from .._noise_args import Noise, split_noise
from .paths import Step, gaussian_step_cpu, launch_gaussian_step

Coefficient = float | Tensor


class GaussianStep(NamedTuple):
    """Outputs of one step; None where not asked for.

    latents: y [B, ...]. log_prob: float32 [B], of the latents as stored. clean: predicted clean sample [B, ...] in y's
    dtype. v: the model output that was used, guided and rounded, [B, ...] in v's dtype: the `v_old` of `shift_moments`.
    """

    latents: Tensor
    log_prob: Tensor | None
    clean: Tensor | None
    v: Tensor | None


@overload
def gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    *,
    out_dtype: torch.dtype | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    return_all: Literal[False] = False,
    clean: None = None,
) -> Tensor: ...


@overload
def gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    *,
    out_dtype: torch.dtype | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    return_all: Literal[True],
    clean: Sequence[Coefficient] | None = None,
) -> GaussianStep: ...


@overload
def gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    *,
    out_dtype: torch.dtype | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    return_all: bool,
    clean: Sequence[Coefficient] | None = None,
) -> Tensor | GaussianStep: ...


def gaussian_step(
    x: Tensor,
    v: Tensor,
    a: Coefficient,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    *,
    out_dtype: torch.dtype | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    return_all: bool = False,
    clean: Sequence[Coefficient] | None = None,
) -> Tensor | GaussianStep:
    """Takes one step of a sampler: y = a·x + b·v + s·ε, computed in float32.

    Differentiable once in x, v and v_uncond, straight through the rounding of the guided v; with `return_all`, which
    is for rollouts, not differentiable. On a GPU, coefficients as floats or float32 keep the call at one launch.

    Args:
        x: Latents before the step, [B, ...] of 2 to 5 dimensions: float32, bfloat16 or float16, any strides.
        v: The model output, of x's shape, in a dtype of its own; with guidance the output for the prompt.
        a: The coefficient of x, a float or [B] float64 or float32; `transitions` gives it for each sampler.
        b: The coefficient of v, like a.
        s: The standard deviation of the noise, like a.
        noise: A `NoiseKey` of B rows, ε itself in x's shape, or None for a step without noise (s = 0).
        out_dtype: The dtype of y; None: x's.
        v_uncond: The output for the negative prompt. v_uncond + guidance_scale·(v - v_uncond), rounded to v's dtype,
            takes the place of v.
        guidance_scale: A float or [B]; given if and only if v_uncond is.
        return_all: Returns a `GaussianStep`, from the same pass and launch.
        clean: Coefficients of the predicted clean sample (`transitions.clean_coefficients`); with return_all only.

    Returns:
        The next latents y, [B, ...] contiguous in out_dtype. With return_all a `GaussianStep`: y, its log-probability
        (where there is noise), the guided v (where there is guidance), and the clean sample (where `clean` is given).

    Raises:
        ValueError: Shapes, devices or values do not fit: coefficients that are not finite (checked where reading them
            costs no device-to-host copy), s != 0 without noise, a double backward.
        TypeError: A dtype or a type does not fit.
    """
    check_latents("x", x)
    check_latents("v", v, like=x)
    a, b, s = per_sample("a", a, x), per_sample("b", b, x), per_sample("s", s, x)
    check_no_grad(a=a, b=b, s=s)
    if noise is None:
        _check_noiseless(s)
    eps, words, seed = split_noise(noise, x)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_dtype("out_dtype", out_dtype)
    step = Step(x, v, a, b, s, eps, words, seed, out_dtype, v_uncond, check_guidance(v, v_uncond, guidance_scale))
    step = _check_extras(step, return_all, clean, has_noise=noise is not None)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, v, v_uncond))
    if return_all and differentiable:
        raise ValueError("return_all: has no gradient; call under torch.no_grad(), or detach x and v")
    if not is_eager(x, v, v_uncond, eps, words):
        outputs = _gaussian_step_op(*_with_rows(step))
    elif differentiable:
        return _DifferentiableStep.apply(*step)  # pyright: ignore[reportReturnType]
    else:
        outputs = _forward(step)
    if not return_all:
        return outputs[0]
    asked = step.log_prob, step.clean_a is not None, step.v_uncond is not None
    return GaussianStep(outputs[0], *(t if wanted else None for t, wanted in zip(outputs[1:], asked, strict=True)))


def _check_extras(step: Step, return_all: bool, clean: Sequence[Coefficient] | None, *, has_noise: bool) -> Step:
    if not isinstance(return_all, bool):
        raise TypeError(f"return_all: expected True or False, got {type(return_all).__name__}")
    if not return_all:
        if clean is not None:
            raise ValueError("clean: is returned with return_all=True only")
        return step
    if has_noise:
        step = replaced(step, s=per_sample("s", step.s, step.x, positive=True), log_prob=True)
    if clean is not None:
        if not isinstance(clean, Sequence) or len(clean) < 2:
            raise TypeError(f"clean: expected the coefficients (a, b) of x and v, got {clean!r}")
        clean_a, clean_b = (per_sample("clean", c, step.x) for c in clean[:2])
        check_no_grad(clean=clean_a)
        check_no_grad(clean=clean_b)
        step = replaced(step, clean_a=clean_a, clean_b=clean_b)
    return replaced(step, keep_v=step.v_uncond is not None)


def _check_noiseless(s: Coefficient) -> None:
    if isinstance(s, float) and s != 0.0:
        raise ValueError(f"noise: s = {s} needs noise; pass a NoiseKey or a tensor")
    if isinstance(s, Tensor) and is_host_readable(s) and bool(s.any()):
        raise ValueError("noise: s is not 0, so the step needs noise; pass a NoiseKey or a tensor")


def _with_rows(step: Step) -> Step:
    """Coefficients as [B] tensors, for the custom operators."""
    names = [n for n in ("a", "b", "s", "guidance", "clean_a", "clean_b") if getattr(step, n) is not None]
    values = as_rows([getattr(step, n) for n in names], step.x)
    return replaced(step, **dict(zip(names, values, strict=True)))


def _forward(step: Step, *, kept: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_gaussian_step(step, kept=kept) if launches(step.x) else gaussian_step_cpu(step)


def _gradients(step: Step, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the order of Step's fields; `needed` has a flag for each of them."""
    guidance = None if step.guidance is None else column(step.guidance, grad)
    by_v = column(step.b, grad)
    factors = {"x": column(step.a, grad), "v": by_v if guidance is None else by_v * guidance}
    if guidance is not None:
        factors["v_uncond"] = by_v * (1.0 - guidance)
    gradients: list[Tensor | None] = [None] * len(Step._fields)
    for name, factor in factors.items():
        index = Step._fields.index(name)
        if needed[index]:
            gradients[index] = (grad.to(torch.float32) * factor).to(getattr(step, name).dtype)
    return gradients


class _DifferentiableStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        step = Step(*arguments)
        # Linear: the values of x, v and the noise are not needed, only their dtypes.
        empty = {n: t.new_empty(0) for n in ("x", "v", "v_uncond") if (t := getattr(step, n)) is not None}
        save_arguments(ctx, replaced(step, eps=None, words=None, **empty))
        return _forward(step)[0]

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("gaussian_step")
        return tuple(_gradients(Step(*saved_arguments(ctx)), grads[0], ctx.needs_input_grad))


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
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    clean_a: Tensor | None = None,
    clean_b: Tensor | None = None,
    log_prob: bool = False,
    keep_v: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_traced(a=a, b=b, guidance_scale=guidance, **({"s": s} if log_prob else {}))
    if eps is None and words is None:
        _check_noiseless(s)
    step = Step(x, v, a, b, s, eps, words, seed, out_dtype, v_uncond, guidance, clean_a, clean_b, log_prob, keep_v)
    return _forward(step, kept=False)


@_gaussian_step_op.register_fake
def _(*arguments):
    return Step(*arguments).outputs()


def _setup_context(ctx, inputs, output):
    save_arguments(ctx, inputs)


def _op_backward(ctx, grad, *unused):
    refuse_double_backward("gaussian_step")
    arguments = saved_arguments(ctx)
    return tuple(_gradients(Step(*arguments), grad, ctx.needs_input_grad)[: len(arguments)])


_gaussian_step_op.register_autograd(_op_backward, setup_context=_setup_context)
