"""Public clipped loss: checks, CPU path, Triton launch, custom operators and gradient."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._autograd import refuse_double_backward
from .._checks import as_rows, check_integer, check_no_grad, check_number, check_traced, is_eager, per_sample
from .._launch import kernel_scalar, launch, launches

Coefficient = float | Tensor
Ratio = Literal["gaussian", "unit", "ratio_norm"]


class LossStatistics(NamedTuple):
    """Sums over samples, each times the sample's weight (divide by `weight` for means), and the largest |ratio - 1|.

    Float32 scalars on the device of the loss, without gradient. kl is Q/2, or Q_reference/2 where there is one;
    `clipped` and `dropped` count samples whose clipped branch is the loss, and those that DPPO drops.
    """

    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    dropped: Tensor
    loss: Tensor
    weight: Tensor
    max_deviation: Tensor


class Objective(NamedTuple):
    """Numbers of the objective, checked; `unit` multiplies P and Q: 1, or D where log-probabilities are sums."""

    ratio: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    dppo_threshold: float | None
    kl_weight: float
    unit: float


def clipped_loss(
    P: Tensor,
    Q: Tensor,
    s: Coefficient,
    advantage: Tensor,
    weight: Coefficient,
    *,
    clip_low: float,
    clip_high: float,
    ratio: Ratio = "gaussian",
    dual_clip: float | None = None,
    dppo_threshold: float | None = None,
    kl_weight: float = 0.0,
    Q_reference: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    elements: int | None = None,
) -> tuple[Tensor, LossStatistics]:
    """Σ weight·max(-A·r, -A·clip(r, 1 - clip_low, 1 + clip_high)), a float32 scalar, and its statistics.

    `P`, `Q` float32 [B] are `shift_moments`; `advantage` [B], and `s`, `weight` floats or [B], are float32/float64.
    The log of r is P - Q/2 for ratio "gaussian", 2s²(P - Q/2) for "unit" (CPS trainers), s·P for "ratio_norm"
    (arXiv 2510.22319). `dual_clip` bounds the loss by -A·dual_clip where A < 0 (arXiv 1912.09729);
    `dppo_threshold` drops samples with Q/2 at or above it whose ratio moves further outwards (Flow-DPPO);
    `kl_weight`·`Q_reference`/2 is added, Q_reference [B] being the second moment against a reference model.
    reduction "sum" is the convention of log-probabilities summed over a sample's `elements`: P and Q times D.

    Differentiable once in P, Q and Q_reference. Divide by the number of samples through `weight`. Raises ValueError or
    TypeError for shapes, dtypes or devices that do not fit, values out of range or not finite (checked where reading
    them costs no device-to-host copy), a gradient asked of anything else, and a double backward.
    """
    objective = check_objective(clip_low, clip_high, ratio, dual_clip, dppo_threshold, kl_weight, reduction, elements)
    _check_moments(P, Q, Q_reference)
    if kl_weight != 0.0 and Q_reference is None:
        raise ValueError("kl_weight: needs Q_reference, the second moment against the reference model's output")
    s, advantage, weight = check_rows(s, advantage, weight, P)
    if not is_eager(P, Q, Q_reference, advantage):
        rows = as_rows((s, advantage, weight), P)
        loss, statistics, _ = _clipped_loss_op(P, Q, *rows, Q_reference, *objective)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (P, Q, Q_reference)):
        loss, statistics = _ClippedLoss.apply(P, Q, s, advantage, weight, Q_reference, objective)  # pyright: ignore
    else:
        loss, statistics, _ = _forward(P, Q, s, advantage, weight, Q_reference, objective)
    return loss, LossStatistics(*statistics.detach().unbind(0))


def check_objective(
    clip_low: float,
    clip_high: float,
    ratio: str,
    dual_clip: float | None,
    dppo_threshold: float | None,
    kl_weight: float,
    reduction: str,
    elements: int | None,
) -> Objective:
    """The objective's numbers, or ValueError with the name of the one out of range."""
    if ratio not in get_args(Ratio):
        raise ValueError(f"ratio: unknown form {ratio!r}; one of: {', '.join(get_args(Ratio))}")
    numbers = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "dppo_threshold": dppo_threshold}
    for name, value in (numbers | {"kl_weight": kl_weight}).items():
        if value is not None or name not in ("dual_clip", "dppo_threshold"):
            check_number(name, value)
    for name, value, valid, expected in (
        ("clip_low", clip_low, 0 <= clip_low < math.inf, "at least 0"),
        ("clip_high", clip_high, 0 <= clip_high < math.inf, "at least 0"),
        ("dual_clip", dual_clip, dual_clip is None or 1 < dual_clip < math.inf, "greater than 1, or None"),
        (
            "dppo_threshold",
            dppo_threshold,
            dppo_threshold is None or 0 < dppo_threshold < math.inf,
            "positive, or None",
        ),
        ("kl_weight", kl_weight, 0 <= kl_weight < math.inf, "at least 0"),
    ):
        if not valid:
            raise ValueError(f"{name}: must be {expected}, got {value}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum' over a sample's elements, got {reduction!r}")
    if reduction == "sum" and elements is None:
        raise ValueError("elements: reduction 'sum' needs the latent elements of one sample, got None")
    if elements is not None:
        check_integer("elements", elements, 1, 1 << 63)
    unit = float(elements) if reduction == "sum" and elements is not None else 1.0
    return Objective(ratio, clip_low, clip_high, dual_clip, dppo_threshold, kl_weight, unit)


def check_rows(s: object, advantage: object, weight: object, like: Tensor) -> tuple[Coefficient, Tensor, Coefficient]:
    """Checked scale, advantages and weights of the samples of `like` [B, ...]."""
    if not isinstance(advantage, Tensor) or advantage.ndim != 1:
        raise TypeError(f"advantage: expected a [{like.shape[0]}] tensor, one for each sample")
    rows = per_sample("advantage", advantage, like)
    assert isinstance(rows, Tensor)
    s, weight = per_sample("s", s, like, positive=True), per_sample("weight", weight, like)
    check_no_grad(s=s, advantage=rows, weight=weight)
    return s, rows, weight


def _check_moments(P: object, Q: object, Q_reference: object) -> None:
    if not isinstance(P, Tensor):
        raise TypeError(f"P: expected a tensor, got {type(P).__name__}")
    if P.ndim != 1 or P.numel() == 0:
        raise ValueError(f"P: expected non-empty [B], got shape {list(P.shape)}")
    for name, value in (("P", P), ("Q", Q), ("Q_reference", Q_reference)):
        if name == "Q_reference" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected float32 [B] as shift_moments returns it, got {found}")
        if value.shape != P.shape or value.device != P.device:
            raise ValueError(
                f"{name}: expected {list(P.shape)} on {P.device} as P, got {list(value.shape)} on {value.device}"
            )


def _forward(P, Q, s, advantage, weight, Q_reference, objective) -> tuple[Tensor, Tensor, Tensor]:
    body = launch_clipped_loss if launches(P) else clipped_loss_cpu
    return body(P, Q, s, advantage, weight, Q_reference, objective)


def clipped_loss_cpu(
    P: Tensor,
    Q: Tensor,
    s: Coefficient,
    advantage: Tensor,
    weight: Coefficient,
    Q_reference: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ATen path: (loss, statistics [7], factors dL/d(P, Q, Q_reference) [2 or 3, B]) in float32."""
    s, A, w = (c.to(torch.float32) if isinstance(c, Tensor) else c for c in (s, advantage, weight))
    P, Q = P * objective.unit, Q * objective.unit
    gaussian = P - Q / 2
    scale, by_q = {"gaussian": (1.0, -0.5), "unit": (2 * s * s, -0.5), "ratio_norm": (s, 0.0)}[objective.ratio]
    ratio = torch.exp(scale * (P if objective.ratio == "ratio_norm" else gaussian))
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss, was_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    slope = unclipped.masked_fill(was_clipped, 0.0)
    if objective.dual_clip is not None:
        bound, negative = -A * objective.dual_clip, A < 0
        above = negative & (loss > bound)
        # At a tie autograd of minimum gives each side half.
        slope = torch.where(negative & (loss == bound), 0.5 * slope, slope).masked_fill(above, 0.0)
        loss = torch.where(above, bound, loss)
    dropped = torch.zeros_like(was_clipped)
    if objective.dppo_threshold is not None:
        dropped = ((ratio > 1) & (A > 0) | (ratio < 1) & (A < 0)) & (objective.dppo_threshold <= Q / 2)
        loss, slope = loss.masked_fill(dropped, 0.0), slope.masked_fill(dropped, 0.0)
    factors = [w * slope * scale * objective.unit]
    factors.append(factors[0] * by_q)
    kl = Q / 2
    if Q_reference is not None:
        kl = Q_reference * (objective.unit / 2)
        loss = loss + objective.kl_weight * kl
        factors.append(torch.ones_like(P) * w * (objective.kl_weight * 0.5 * objective.unit))
    total = (w * loss).sum()
    columns = torch.stack([ratio, was_clipped.float(), kl, dropped.float(), loss, torch.ones_like(P)]) * w
    deviation = (ratio - 1).abs()
    deviation = torch.where(w > 0, deviation, 0.0) if isinstance(w, Tensor) else deviation * (w > 0)
    return total, torch.cat([columns.sum(1), deviation.amax().view(1)]), torch.stack(factors)


def launch_clipped_loss(
    P: Tensor,
    Q: Tensor,
    s: Coefficient,
    advantage: Tensor,
    weight: Coefficient,
    Q_reference: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton path: one launch."""
    from .kernel import ROWS, WARPS, _clipped_loss_kernel

    batch, device = P.shape[0], P.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    statistics = torch.empty(len(LossStatistics._fields), dtype=torch.float32, device=device)
    factors = torch.empty((2 if Q_reference is None else 3, batch), dtype=torch.float32, device=device)
    moments = P.contiguous(), Q.contiguous(), None if Q_reference is None else Q_reference.contiguous()
    coefficients = [kernel_scalar(c) for c in (s, advantage, weight)]
    per_row = {f"{name}_PER_ROW": isinstance(c, Tensor) for name, c in zip("SAW", coefficients, strict=True)}
    launch(
        _clipped_loss_kernel,
        1,
        device,
        *(loss, statistics, factors, *moments, *coefficients),
        1.0 - objective.clip_low,
        1.0 + objective.clip_high,
        *(objective.dual_clip, objective.dppo_threshold, objective.kl_weight, objective.unit),
        batch,
        RATIO=objective.ratio,
        **per_row,
        ROWS=ROWS,
        num_warps=WARPS,
    )
    return loss, statistics, factors


class _ClippedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P, Q, s, advantage, weight, Q_reference, objective):
        loss, statistics, factors = _forward(P, Q, s, advantage, weight, Q_reference, objective)
        ctx.save_for_backward(factors)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("clipped_loss")
        (factors,) = ctx.saved_tensors
        grad_p, grad_q, *grad_reference = (grads[0] * factors).unbind(0)
        return grad_p, grad_q, None, None, None, *(grad_reference or [None]), None


@torch.library.custom_op("fastgrpo_kernels::clipped_loss", mutates_args=())
def _clipped_loss_op(
    P: Tensor,
    Q: Tensor,
    s: Tensor,
    advantage: Tensor,
    weight: Tensor,
    Q_reference: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    dppo_threshold: float | None,
    kl_weight: float,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_traced(s=s, advantage=advantage, weight=weight)
    objective = Objective(ratio, clip_low, clip_high, dual_clip, dppo_threshold, kl_weight, unit)
    return _forward(P, Q, s, advantage, weight, Q_reference, objective)


@_clipped_loss_op.register_fake
def _(P, Q, s, advantage, weight, Q_reference, *objective):
    statistics = P.new_empty(len(LossStatistics._fields))
    return P.new_empty(()), statistics, P.new_empty((2 if Q_reference is None else 3, P.shape[0]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])


def _op_backward(ctx, grad, *unused):
    refuse_double_backward("clipped_loss")
    (factors,) = ctx.saved_tensors
    grad_p, grad_q, *grad_reference = (grad * factors).unbind(0)
    return grad_p, grad_q, None, None, None, *(grad_reference or [None]), *[None] * 7


_clipped_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
