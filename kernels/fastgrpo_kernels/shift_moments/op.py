"""Public shift moments: CPU path, Triton launches, custom operators and gradient."""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from .._autograd import refuse_double_backward, save_arguments, saved_arguments
from .._checks import check_traced, elements_of, is_eager, replaced
from .._cpu import BlockSums, add_scaled, column, difference, quotient, tile_coefficient, traced_sum
from .._launch import arrivals, is_traced_plainly, launch, launches
from .._noise_args import MatchingTarget, Noise, StoredStep
from ..noise import NoiseKey, normal
from .inputs import (
    LATENTS,
    Shift,
    check_shift,
    empty_gradients,
    guided,
    kernel_arguments,
    masked,
    noise_of,
    shift_tiles,
    with_noise,
    with_rows,
)

Coefficient = float | Tensor


class MatchingMoments(NamedTuple):
    """What one pass holds against a target, float32 [B] each; the last three are without gradient.

    Attributes:
        P: mean(d·e), with d = b·(v - v_old)/s and e = v_old - (noise_scale·ε + x0_scale·x̂0).
        Q: mean(d²).
        R: mean(e²), the old output's squared residual; R + 2P + Q is v's where b = s.
        positive: mean(|e + β·(v - v_old)|), with β the number given as `residuals`.
        negative: mean(|e - β·(v - v_old)|).
    """

    P: Tensor
    Q: Tensor
    R: Tensor
    positive: Tensor
    negative: Tensor


@overload
def shift_moments(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep | MatchingTarget,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    mask: Tensor | None = None,
    residuals: None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def shift_moments(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: MatchingTarget,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    mask: Tensor | None = None,
    residuals: float,
) -> MatchingMoments: ...


def shift_moments(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep | MatchingTarget,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    mask: Tensor | None = None,
    residuals: float | None = None,
) -> tuple[Tensor, Tensor] | MatchingMoments:
    """Moments of the policy's shift since the rollout: P = mean(d·ε), Q = mean(d²) with d = b·(v - v_old)/s.

    log π_new - log π_old = P - Q/2 and the Gaussian KL is Q/2, both as means over a sample's elements (DDPO, arXiv
    2305.13301, eq. 5); with a reference model's output for `v_old`, Q/2 is the KL to it. v == v_old bit for bit gives
    P = Q = 0. The backward regenerates ε and keeps nothing of a latent's size but its inputs; the eager CPU path keeps
    ε, which is cheaper there.

    Args:
        v: [B, ...] of 2 to 5 dimensions, float32, bfloat16 or float16, any strides; differentiable.
        v_old: the rollout's model output, [B, ...], in any of these dtypes.
        b: the step's coefficient of v, a float or [B] float32/float64 (see `transitions`). On a device a float32
            tensor of any stride, such as a column of a table, is read where it is.
        s: the step's standard deviation, > 0, likewise.
        noise: the NoiseKey the step was taken with, its ε as a tensor [B, ...], or the StoredStep (x, y, a) it was. Or
            the MatchingTarget of a forward-process objective, whose residual e takes the place of ε; b and s are then
            any numbers of one ratio, 1 and 1 for moments of outputs, and `v_old` is a reference model's output for DPO.
        v_uncond: the unconditional output [B, ...] in v's dtype; differentiable. v is then the conditional one, and
            v_uncond + guidance_scale·(v - v_uncond), rounded to their dtype, takes its place; `v_old` is the guided
            output of the rollout, as `gaussian_step` returns it.
        guidance_scale: a float or [B], with `v_uncond`.
        mask: bool, True where an element counts: of v's shape, of its first dimensions ([B, tokens] of packed
            latents), or with 1 where it is the same for all. Means are over the elements that count; a sample without
            any has P = Q = 0. What is masked is not read, and has no gradient.
        residuals: with a MatchingTarget, return MatchingMoments, whose mean absolute residuals have this factor β.

    Returns:
        P and Q, float32 [B] each, or `MatchingMoments`. P and Q are differentiable once: ∂P/∂v = b·ε/(s·D), ∂Q/∂v =
        2·b·d/(s·D), in v's dtype; with guidance times guidance_scale for v and 1 - guidance_scale for v_uncond,
        straight through the rounding.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, s <= 0 or coefficients that are not finite
            (checked where reading them costs no device-to-host copy), a gradient asked of anything else, a double
            backward.
    """
    shift = check_shift(v, v_old, b, s, noise, v_uncond, guidance_scale, None, mask, residuals)
    if is_traced_plainly(v):
        P, Q, _, _, rest = moments_traced(shift, mean_of_masked=True)
        rest = None if rest is None else rest.detach()
    elif not is_eager(*shift.tensors()):
        P, Q, _, rest = _shift_moments_op(*without_reference(with_rows(shift)))
        rest = rest.detach()
    elif torch.is_grad_enabled() and (v.requires_grad or (v_uncond is not None and v_uncond.requires_grad)):
        P, Q, _, rest = _ShiftMoments.apply(v, v_uncond, shift)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        P, Q, _, rest = _forward(shift)
    if residuals is None:
        return P, Q
    assert rest is not None
    return MatchingMoments(P, Q, *rest.unbind(0))


def without_reference(shift: Shift) -> tuple:
    """Arguments of the operators of the moments, which know no reference model."""
    return tuple(value for name, value in zip(Shift._fields, shift, strict=True) if name != "v_reference")


def _forward(shift: Shift, *, kept: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P, Q, share, residuals): `share` [B] is a sample's elements over those that count, empty without a mask;
    `residuals` [3, B] are the last three of MatchingMoments, empty where none were asked for."""
    if launches(shift.v):
        return launch_shift_moments(shift, kept=kept)
    P, Q, _, share, rest = moments_cpu(shift, mean_of_masked=True)
    return P, Q, P.new_empty(0) if share is None else share, P.new_empty(0) if rest is None else rest


def _backward(grad_p: Tensor, grad_q: Tensor, share: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    if shift.mask is not None:
        grad_p, grad_q = grad_p * share, grad_q * share
    body = launch_shift_moments_backward if launches(shift.v) else shift_moments_backward_cpu
    return body(grad_p, grad_q, shift)


Sums = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def moments_cpu(shift: Shift, *, mean_of_masked: bool) -> Sums:
    """The ATen path, (P, Q, Q against the reference, share, residuals): float32 sums in blocks, scaled once a sample in
    float64.

    Without `mean_of_masked` sums over a mask are still divided by all elements, and there is no share.
    """
    batch, elements = shift.v.shape[0], elements_of(shift.v)
    # Of d·ε, d², d² to the reference, of elements that count, and of residuals.
    sums = BlockSums(slots(shift), batch, elements)
    for tile, part in shift_tiles(shift):
        v = guided(part)
        if part.v_reference is not None:
            sums.add(2, tile, _selected(difference(v, part.v_reference), part.mask).square_())
        change = _selected(difference(v, part.v_old), part.mask)
        sums.add(1, tile, change * change)
        noise = noise_of(part)
        if part.residuals is not None:
            _selected(noise, part.mask)
            sums.add(4, tile, noise * noise)
            sums.add(5, tile, torch.add(noise, change, alpha=part.residuals).abs_())
            sums.add(6, tile, torch.sub(noise, change, alpha=part.residuals).abs_())
        # Also where ε is no number.
        sums.add(0, tile, _selected(change.mul_(noise), part.mask))
        if part.mask is not None:
            sums.add(3, tile, part.mask.to(torch.float32))
    totals = sums.total()
    scale = quotient(shift.b, shift.s)
    linear, square = scale / elements, scale * scale / elements
    share = None
    if shift.mask is not None and mean_of_masked:
        share = elements / totals[3].clamp_min(1.0)
        linear, square = linear * share, square * share
    P, Q = (totals[0] * linear).float(), (totals[1] * square).float()
    reference = None if shift.v_reference is None else (totals[2] * square).float()
    rest = (
        None
        if shift.residuals is None
        else (torch.stack(totals[4:]) * (1 / elements if share is None else share / elements)).float()  # pyright: ignore
    )
    return P, Q, reference, None if share is None else share.float(), rest


def slots(shift: Shift) -> int:
    """How many sums of a row are kept: up to the last one that is asked for."""
    if shift.residuals is not None:
        return 7
    return 4 if shift.mask is not None else 3 if shift.v_reference is not None else 2


def moments_traced(shift: Shift, *, mean_of_masked: bool) -> Sums:
    """The formula of `moments_cpu`, for `torch.compile` on a CPU; NaN where s is not positive, which it cannot read."""
    shape, elements = shift.v.shape, elements_of(shift.v)
    if shift.words is not None:
        shift = replaced(shift, eps=normal(NoiseKey(shift.seed, shift.words), shape[1:]), words=None)
    if isinstance(shift.s, Tensor):
        shift = replaced(shift, s=torch.where(shift.s > 0, shift.s, torch.nan))
    flat = {n: t.flatten(1) for n in LATENTS if (t := getattr(shift, n)) is not None}
    shift = replaced(shift, **flat, mask=masked(shift))
    v = guided(shift)
    change = _selected(difference(v, shift.v_old), shift.mask)
    noise = noise_of(shift)
    totals = [_selected(change * noise, shift.mask), change.square()]
    if shift.v_reference is not None:
        totals.append(_selected(difference(v, shift.v_reference), shift.mask).square())
    scale, share = quotient(shift.b, shift.s), None
    factors = [scale / elements, *[scale * scale / elements] * (len(totals) - 1)]
    if shift.mask is not None and mean_of_masked:
        share = elements / shift.mask.sum(1).clamp_min(1).float()
        factors = [factor * share for factor in factors]
    P, Q, *reference = ((traced_sum(t) * factor).float() for t, factor in zip(totals, factors, strict=True))
    rest = None
    if shift.residuals is not None:
        noise, change = noise.detach(), change.detach() * shift.residuals
        # Not in place: the product above keeps it.
        noise = noise if shift.mask is None else noise.masked_fill(~shift.mask, 0.0)
        parts = noise.square(), (noise + change).abs(), (noise - change).abs()
        mean = 1 / elements if share is None else share / elements
        rest = torch.stack([(traced_sum(part) * mean).float() for part in parts])
    return P, Q, reference[0] if reference else None, share, rest


def _selected(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values, in place zero where the mask selects none."""
    return values if mask is None else values.masked_fill_(~mask, 0.0)


def shift_moments_backward_cpu(
    grad_p: Tensor, grad_q: Tensor, shift: Shift, grad_reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of v and v_uncond in ATen, tile by tile."""
    scale = quotient(shift.b, shift.s)
    per_element = scale / elements_of(shift.v)
    by_change, by_noise = _scaled(grad_q, 2.0 * scale * per_element), _scaled(grad_p, per_element)
    by_reference = None if grad_reference is None else _scaled(grad_reference, 2.0 * scale * per_element)
    in_place = shift.guidance is None and shift.v.dtype == shift.v_old.dtype == torch.float32
    gradients: list[Tensor] = []
    for tile, part in shift_tiles(shift):
        if tile is not None and not gradients:
            gradients = [out if out.ndim == 1 else out.flatten(1) for out in empty_gradients(shift)]
        v = guided(part)
        in_this = None if tile is None or not in_place else gradients[0][tile]
        grad = difference(v, part.v_old) if in_this is None else torch.sub(v, part.v_old, out=in_this)
        grad.mul_(column(tile_coefficient(by_change, tile), v))
        add_scaled(grad, tile_coefficient(by_noise, tile), noise_of(part))
        if part.v_reference is not None and by_reference is not None:
            add_scaled(grad, tile_coefficient(by_reference, tile), difference(v, part.v_reference))
        _selected(grad, part.mask)
        uncond = None
        if part.guidance is not None:
            guidance = column(part.guidance, v)
            uncond = grad * (1.0 - guidance)
            grad.mul_(guidance)
        if tile is None:
            shape = shift.v.shape
            whole = None if uncond is None else uncond.to(v.dtype).view(shape)
            return grad.to(v.dtype).view(shape), v.new_empty(0) if whole is None else whole
        if in_this is None:
            gradients[0][tile] = grad
        if uncond is not None:
            gradients[1][tile] = uncond
    return gradients[0].view(shift.v.shape), gradients[1] if shift.guidance is None else gradients[1].view(
        shift.v.shape
    )


def _scaled(grad: Tensor, factor: float | Tensor) -> Tensor:
    """grad·factor in float32; factors that differ by row are float64."""
    return grad * factor if isinstance(factor, float) else (grad.double() * factor).float()


def launch_shift_moments(shift: Shift, *, kept: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton path, one launch: (P, Q, share, residuals)."""
    from .kernel import _shift_moments_fwd_kernel

    arguments, constants, programs = kernel_arguments(shift)
    batch, device = shift.v.shape[0], shift.v.device
    partials = torch.empty((slots(shift), programs), dtype=torch.float32, device=device)
    # Not parts of one tensor: results of a custom operator may not share their storage.
    P, Q = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(2))
    share, rest = empty_extras(shift, batch, device)
    outputs = P, Q, None if shift.mask is None else share, None if shift.residuals is None else rest
    workspace = partials, arrivals(batch, device, kept=kept)
    launch(_shift_moments_fwd_kernel, programs, device, *outputs, *workspace, *arguments, **constants)
    return P, Q, share, rest


def empty_extras(shift: Shift, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Buffers for the share and the residuals; empty where there are none."""
    share = torch.empty(0 if shift.mask is None else batch, dtype=torch.float32, device=device)
    rest = torch.empty(0 if shift.residuals is None else (3, batch), dtype=torch.float32, device=device)
    return share, rest


def launch_shift_moments_backward(
    grad_p: Tensor,
    grad_q: Tensor,
    shift: Shift,
    grad_reference: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of v and v_uncond by Triton, one launch; `grad`, a scalar or [B], multiplies the others."""
    from .kernel import _shift_moments_bwd_kernel

    arguments, constants, programs = kernel_arguments(shift)
    grad_v, grad_v_uncond = empty_gradients(shift)
    step = None if grad is None else grad.stride(0) if grad.ndim else 0
    grads = [grad, grad_p.contiguous(), grad_q.contiguous(), grad_reference]
    launch(
        _shift_moments_bwd_kernel, programs, grad_v.device, grad_v, grad_v_uncond, *grads, *arguments,
        grad_step=step, **constants,
    )  # fmt: skip
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
    def forward(ctx, v, v_uncond, shift):
        # What is differentiated stands alone: autograd's time is that of its arguments.
        if not launches(shift.v):
            shift = with_noise(shift)
        P, Q, share, rest = _forward(shift)
        save_arguments(ctx, (share, *shift))
        ctx.mark_non_differentiable(share, rest)
        # Else autograd would fill zeros for each output that no loss reads.
        ctx.set_materialize_grads(False)
        return P, Q, share, rest

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("shift_moments")
        if grads[0] is None and grads[1] is None:
            return None, None, None
        share, *arguments = saved_arguments(ctx)
        shift = Shift(*arguments)
        grad_p, grad_q = (torch.zeros_like(grads[1 - i]) if grads[i] is None else grads[i] for i in (0, 1))
        grad, grad_uncond = _backward(grad_p, grad_q, share, shift)
        return grad, None if shift.v_uncond is None else grad_uncond, None


_NAMES = tuple(name for name in Shift._fields if name != "v_reference")


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
    mask: Tensor | None = None,
    inner: int = 1,
    x0: Tensor | None = None,
    noise_scale: Tensor | None = None,
    x0_scale: Tensor | None = None,
    residuals: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_traced(a=a, b=b, s=s, guidance_scale=guidance, noise_scale=noise_scale, x0_scale=x0_scale)
    target = x0, noise_scale, x0_scale, residuals
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, None, mask, inner, *target)
    return _forward(shift, kept=False)


@_shift_moments_op.register_fake
def _(*arguments):
    shift = _named(arguments)
    batch, device = shift.v.shape[0], shift.v.device
    P, Q = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(2))
    return P, Q, *empty_extras(shift, batch, device)


@torch.library.custom_op("fastgrpo_kernels::shift_moments_backward", mutates_args=())
def _shift_moments_backward_op(
    grad_p: Tensor,
    grad_q: Tensor,
    share: Tensor,
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
    mask: Tensor | None = None,
    inner: int = 1,
    x0: Tensor | None = None,
    noise_scale: Tensor | None = None,
    x0_scale: Tensor | None = None,
    residuals: float | None = None,
) -> tuple[Tensor, Tensor]:
    target = x0, noise_scale, x0_scale, residuals
    shift = Shift(v, v_old, b, s, eps, words, seed, x, y, a, v_uncond, guidance, None, mask, inner, *target)
    return _backward(grad_p, grad_q, share, shift)


@_shift_moments_backward_op.register_fake
def _(grad_p, grad_q, share, *arguments):
    return empty_gradients(_named(arguments))


def _named(arguments) -> Shift:
    return Shift(**dict(zip(_NAMES, arguments, strict=False)))


def _setup_context(ctx, inputs, output):
    save_arguments(ctx, (output[2], *inputs))


def _op_backward(ctx, grad_p, grad_q, *unused):
    refuse_double_backward("shift_moments")
    share, *arguments = saved_arguments(ctx)
    gradients = place(_shift_moments_backward_op(grad_p, grad_q, share, *arguments), _named(arguments))
    return without_reference(Shift(*gradients))[: len(arguments)]  # pyright: ignore[reportArgumentType]


_shift_moments_op.register_autograd(_op_backward, setup_context=_setup_context)
