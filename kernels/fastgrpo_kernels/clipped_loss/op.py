"""Public clipped loss: checks, CPU path, Triton launch, custom operators and gradient."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._autograd import refuse_double_backward
from .._checks import (
    as_coefficients,
    as_rows,
    check_integer,
    check_no_grad,
    check_number,
    check_traced,
    is_eager,
    is_host_readable,
)
from .._checks import per_sample as per_sample_rows
from .._launch import coefficient_steps, is_traced_plainly, kernel_scalar, launch, launches

Coefficient = float | Tensor
Ratio = Literal["gaussian", "unit", "ratio_norm", "matching", "huber"]
RATIOS = get_args(Ratio)
# Forms whose moments are those against a MatchingTarget.
MATCHING = ("matching", "huber")


class LossStatistics:
    """Sums over samples, each times the sample's weight, and the largest |ratio - 1| of samples with a weight > 0.

    All of them are one float32 tensor on the device of the loss, without gradient, so that a trainer keeps one tensor
    of each micro-batch; `LossStatistics.total` adds them up. Divide by `weight` for means. kl is Q/2, or Q_reference/2
    where there is a reference; `clipped` and `dropped` count samples whose clipped branch is the loss, and those that
    DPPO drops, as shares of their advantages where a sample has several.

    Args:
        values: [..., 7], in the order of `FIELDS`, or what gives them: on a CPU they are computed when they are asked
            for.
    """

    def __init__(self, values: Tensor | Callable[[], Tensor]) -> None:
        self._values = values

    def __repr__(self) -> str:
        return f"LossStatistics(values={self.values})"

    @property
    def values(self) -> Tensor:
        if not isinstance(self._values, Tensor):
            self._values = self._values()
        return self._values

    @property
    def ratio(self) -> Tensor:
        return self.values[..., 0]

    @property
    def clipped(self) -> Tensor:
        return self.values[..., 1]

    @property
    def kl(self) -> Tensor:
        return self.values[..., 2]

    @property
    def dropped(self) -> Tensor:
        return self.values[..., 3]

    @property
    def loss(self) -> Tensor:
        return self.values[..., 4]

    @property
    def weight(self) -> Tensor:
        return self.values[..., 5]

    @property
    def max_deviation(self) -> Tensor:
        return self.values[..., 6]

    @staticmethod
    def total(values: Sequence[Tensor]) -> "LossStatistics":
        """Returns the statistics of several calls as one, in float64: sums of sums, and the largest deviation.

        Args:
            values: `values` of each, [7]; not empty.
        """
        stacked = torch.stack(list(values)).double()
        return LossStatistics(torch.cat([stacked[:, :-1].sum(0), stacked[:, -1:].amax(0)]))


# Values of statistics, or what computes them.
Statistics = Tensor | Callable[[], Tensor]
FIELDS = ("ratio", "clipped", "kl", "dropped", "loss", "weight", "max_deviation")


class Objective(NamedTuple):
    """Numbers of the objective, checked; `unit` multiplies P and Q: 1, or D where log-probabilities are sums.

    The ratio "nft" is DiffusionNFT's loss, whose advantages are clipped to -clip_low and clip_high.
    """

    ratio: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    dppo_threshold: float | None
    kl_weight: float
    unit: float


def clipped_loss(
    P: Tensor | None = None,
    Q: Tensor | None = None,
    s: Coefficient | None = None,
    advantages: Tensor | None = None,
    weight: Coefficient = 1.0,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio: Tensor | None = None,
    ratio: Ratio = "gaussian",
    dual_clip: float | None = None,
    dppo_threshold: float | None = None,
    kl_weight: float = 0.0,
    Q_reference: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    elements: int | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, LossStatistics]:
    """The clipped policy loss Σ weight·max(-A·r, -A·clip(r, 1 - clip_low, 1 + clip_high)).

    It is that of PPO (arXiv 1707.06347, eq. 7).

    Args:
        P, Q: the moments of `shift_moments`, float32 [B]; differentiable. Q may be None where P is all there is.
        s: the steps' standard deviation, a float or [B]; needed by the ratios "unit" and "ratio_norm" alone.
        advantages: float32 or float64 [B], or [B, R] for R clipped losses that are summed, one for each reward with its
            weight inside.
        weight: weight of each sample, a float or [B]; 1/B makes the loss a mean. A sample of weight 0 is padding: it
            has no part in loss, statistics or gradient.
        clip_low, clip_high: how far below and above 1 the ratio may go.
        log_ratio: log π_new - log π_old, float32 [B], in place of P and Q, for who has log-probabilities already;
            differentiable. It takes the place of P - Q/2, and of P for ratio "ratio_norm".
        ratio: the log of r is P - Q/2 for "gaussian", 2s²(P - Q/2) for "unit" (CPS trainers, arXiv 2509.05952), s·P for
            "ratio_norm" (GRPO-Guard, arXiv 2510.22319). Of moments against a MatchingTarget with b = s = w, the weight
            of a log-ratio, it is -w(2P + Q) for "matching" (AWM, arXiv 2509.25050: 1, t or t²) and, in `grpo_loss`,
            -w(√(R + 2P + Q + 1e-10) - √(R + 1e-10)) for "huber" (its weighting of that name, with w = t).
        dual_clip: bounds the loss by -A·dual_clip where A < 0 (arXiv 1912.09729, eq. 5).
        dppo_threshold: drops samples with Q/2 at or above it whose ratio moves further outwards (Flow-DPPO).
        kl_weight: kl_weight·Q_reference/2 is added to a sample's loss.
        Q_reference: second moment against a reference model, float32 [B]; differentiable.
        reduction: "sum" is the convention of log-probabilities that are summed over a sample's `elements`: P and Q
            times D.
        elements: D, for reduction "sum".
        per_sample: return the samples' weighted losses [B] instead of their sum.

    Returns:
        The loss, a float32 scalar or [B], differentiable once, and its statistics.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, values out of range or not finite (checked
            where reading them costs no device-to-host copy), a gradient asked of anything else, a double backward.
    """
    objective = check_objective(clip_low, clip_high, ratio, dual_clip, dppo_threshold, kl_weight, reduction, elements)
    if ratio == "huber":
        raise ValueError("ratio: 'huber' needs the old output's residual; grpo_loss with a MatchingTarget has it")
    if log_ratio is not None:
        if P is not None or Q is not None:
            raise TypeError("log_ratio: takes the place of P and Q; pass either")
        P = log_ratio
    _check_moments("P" if log_ratio is None else "log_ratio", P, Q, Q_reference)
    assert P is not None
    if kl_weight != 0.0 and Q_reference is None:
        raise ValueError("kl_weight: needs Q_reference, the second moment against the reference model's output")
    if s is None:
        if ratio != "gaussian":
            raise TypeError(f"s: ratio {ratio!r} needs the steps' standard deviation")
        s = 1.0
    s = per_sample_rows("s", s, P, positive=True)
    advantages, weight = check_rows(advantages, weight, P)
    check_no_grad(s=s)
    if is_traced_plainly(P):
        step = s if not isinstance(s, Tensor) else torch.where(s > 0, s, torch.nan)
        loss, sums, _ = clipped_loss_cpu(P, Q, step, advantages, weight, Q_reference, objective, per_sample)
        statistics = sums().detach()
    elif not is_eager(P, Q, Q_reference, advantages):
        s, weight = as_rows((s, weight), P)
        loss, statistics, _ = _clipped_loss_op(P, Q, s, advantages, weight, Q_reference, *objective, per_sample)
        statistics = statistics.detach()
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (P, Q, Q_reference)):
        kept: list[Statistics] = []
        rows = s, advantages, weight
        loss = _ClippedLoss.apply(P, Q, *rows, Q_reference, objective, per_sample, kept)
        (statistics,) = kept
    else:
        loss, statistics, _ = _forward(P, Q, s, advantages, weight, Q_reference, objective, per_sample)
    return loss, LossStatistics(statistics)


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
    if ratio not in RATIOS:
        raise ValueError(f"ratio: unknown form {ratio!r}; one of: {', '.join(RATIOS)}")
    values: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "kl_weight": kl_weight}
    for name, value in values.items():
        values[name] = check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: must be at least 0, got {value}")
    for name, value, least, expected in (
        ("dual_clip", dual_clip, 1, "greater than 1"),
        ("dppo_threshold", dppo_threshold, 0, "positive"),
    ):
        values[name] = None if value is None else check_number(name, value)
        if value is not None and not least < value < math.inf:
            raise ValueError(f"{name}: must be {expected}, or None, got {value}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum' over a sample's elements, got {reduction!r}")
    if reduction == "sum" and elements is None:
        raise ValueError("elements: reduction 'sum' needs the latent elements of one sample, got None")
    if elements is not None:
        check_integer("elements", elements, 1, 1 << 63)
    unit = float(elements) if reduction == "sum" and elements is not None else 1.0
    return Objective(ratio=ratio, unit=unit, **values)


def check_rows(advantages: object, weight: object, like: Tensor) -> tuple[Tensor, Coefficient]:
    """Checked advantages, [B] or [B, R], and weights of the samples of `like` [B, ...]."""
    batch = like.shape[0]
    if not isinstance(advantages, Tensor) or advantages.ndim not in (1, 2):
        raise TypeError(f"advantages: expected a [{batch}] tensor, one for each sample, or [{batch}, R]")
    if advantages.shape[0] != batch or advantages.numel() == 0:
        raise ValueError(f"advantages: expected shape [{batch}, R] or [{batch}], got {list(advantages.shape)}")
    rows = as_coefficients("advantages", advantages, like)
    weight = per_sample_rows("weight", weight, like)
    check_no_grad(advantages=advantages, weight=weight)
    return rows, weight


def _check_moments(name: str, P: object, Q: object, Q_reference: object) -> None:
    if not isinstance(P, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(P).__name__}")
    if P.ndim != 1 or P.numel() == 0:
        raise ValueError(f"{name}: expected non-empty [B], got shape {list(P.shape)}")
    for argument, value in ((name, P), ("Q", Q), ("Q_reference", Q_reference)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{argument}: expected float32 [B], got {found}")
        if value.shape != P.shape or value.device != P.device:
            found = f"{list(value.shape)} on {value.device}"
            raise ValueError(f"{argument}: expected {list(P.shape)} on {P.device} as {name}, got {found}")


def _forward(P, Q, s, advantages, weight, Q_reference, objective, per_sample) -> tuple[Tensor, Statistics, Tensor]:
    arguments = P, Q, s, advantages, weight, Q_reference, objective, per_sample
    if launches(P):
        return launch_clipped_loss(*arguments)
    loss, statistics, factors = clipped_loss_cpu(*arguments)
    return loss, statistics, torch.stack(factors)


def computed(statistics: Statistics) -> Tensor:
    return statistics if isinstance(statistics, Tensor) else statistics()


def clipped_loss_cpu(
    P: Tensor,
    Q: Tensor | None,
    s: Coefficient,
    advantages: Tensor,
    weight: Coefficient,
    Q_reference: Tensor | None,
    objective: Objective,
    per_sample: bool = False,
    share: Tensor | None = None,
    residuals: Tensor | None = None,
    beta: float | None = None,
) -> tuple[Tensor, Callable[[], Tensor], list[Tensor]]:
    """The ATen path: (loss, what gives its statistics [7], factors dL/d(P, Q, Q_reference), 1 to 3 of [B]) in float32.

    `share` [B] multiplies the factors where moments are means over a mask. `residuals` [3, B] are R and, for the factor
    `beta` of the change, the two mean absolute residuals.
    """
    s, w = (c.to(torch.float32) if isinstance(c, Tensor) else c for c in (s, weight))
    N = -advantages.to(torch.float32)
    if isinstance(w, Tensor) and not (is_host_readable(w) and all(w.tolist())):
        # A sample of weight 0 has no part in anything, whatever its moments are.
        padding = w == 0
        P = P.masked_fill(padding, 0.0)
        Q, Q_reference = (None if m is None else m.masked_fill(padding, 0.0) for m in (Q, Q_reference))
        residuals = None if residuals is None else residuals.masked_fill(padding, 1.0)
    if objective.unit != 1.0:
        P = P * objective.unit
    half = torch.zeros_like(P) if Q is None else Q * (objective.unit / 2)
    # The log-ratio's derivative by P, None for 1, and that by Q over it.
    if objective.ratio == "gaussian":
        scale, by_q, log_ratio = None, -0.5, P - half
    elif objective.ratio == "unit":
        scale, by_q = 2 * s * s, -0.5
        log_ratio = scale * (P - half)
    elif objective.ratio == "ratio_norm":
        scale, by_q, log_ratio = s, 0.0, s * P
    elif objective.ratio == "huber":
        assert residuals is not None
        # The difference of the two roots, which subtracting them would lose where the policy has hardly moved.
        before, moved = residuals[0] * objective.unit, 2 * (P + half)
        root = (before + moved + ROOT_FLOOR).clamp_min(0).sqrt()
        scale, by_q = -s / root, 0.5
        log_ratio = -s * moved / (root + (before + ROOT_FLOOR).sqrt())
    else:
        scale, by_q = -2 * s * s if objective.ratio == "nft" else -2 * s, 0.5
        log_ratio = scale * (P + half)
    ratio = torch.exp(log_ratio)
    if objective.ratio == "nft":
        assert Q is not None
        assert residuals is not None
        assert beta is not None
        loss, was_clipped, factors = _nft(P, Q, s, N, residuals, beta, objective.clip_high)
        factor = w if share is None else w * share
        factors = [f * factor for f in factors]
        return _totals(ratio, [was_clipped], loss, half, w, Q_reference, factors, factor, objective, per_sample)
    several = N.ndim == 2
    r, h = (ratio[:, None], half[:, None]) if several else (ratio, half)
    unclipped, clipped = N * r, N * r.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss, was_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    slope = unclipped.masked_fill(was_clipped, 0.0)
    if objective.dual_clip is not None:
        bound, negative = N * objective.dual_clip, N > 0
        above = negative & (loss > bound)
        # At a tie autograd of minimum gives each side half.
        slope = torch.where(negative & (loss == bound), 0.5 * slope, slope).masked_fill(above, 0.0)
        loss = torch.where(above, bound, loss)
    shares = [was_clipped.float()]
    if objective.dppo_threshold is not None:
        dropped = ((r > 1) & (N < 0) | (r < 1) & (N > 0)) & (objective.dppo_threshold <= h)
        loss, slope = loss.masked_fill(dropped, 0.0), slope.masked_fill(dropped, 0.0)
        shares.append(dropped.float())
    if several:
        loss, slope, shares = loss.sum(1), slope.sum(1), [share_.mean(1) for share_ in shares]
    factor = w if objective.unit == 1.0 else w * objective.unit
    factor = factor if share is None else factor * share
    factors = [slope * factor if scale is None else slope * scale * factor]
    if Q is not None:
        factors.append(factors[0] * by_q)
    elif Q_reference is not None:
        factors.append(factors[0])
    return _totals(ratio, shares, loss, half, w, Q_reference, factors, factor, objective, per_sample)


# In the two roots of AWM's "huber" weighting.
ROOT_FLOOR = 1e-10
# The least mean absolute residual by which DiffusionNFT divides.
RESIDUAL_FLOOR = 1e-5


def _nft(
    P: Tensor, Q: Tensor, t: Coefficient, N: Tensor, residuals: Tensor, beta: float, clip: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """DiffusionNFT's loss [B] of negated advantages, the share of those that are clipped, and its slopes by P and Q."""
    # Without gradient in forward mode too.
    R, positive, negative = residuals.detach().unbind(0)
    r, was_clipped = 0.5 - N.clamp(-clip, clip) / (2 * clip), (N.abs() > clip).float()
    opposite = 1 - r
    if N.ndim == 2:
        r, opposite, was_clipped = r.sum(1), opposite.sum(1), was_clipped.mean(1)
    up, down = r / (t * positive).clamp_min(RESIDUAL_FLOOR), opposite / (t * negative).clamp_min(RESIDUAL_FLOOR)
    unit = t * t * clip
    by_p, by_q = 2 * unit * (up - down), unit * beta * (up + down)
    return unit / beta * (up + down) * R + by_p * P + by_q * Q, was_clipped, [by_p, by_q]


def _totals(
    ratio: Tensor,
    shares: list[Tensor],
    loss: Tensor,
    kl: Tensor,
    w: Coefficient,
    Q_reference: Tensor | None,
    factors: list[Tensor],
    factor: Coefficient,
    objective: Objective,
    per_sample: bool,
) -> tuple[Tensor, Callable[[], Tensor], list[Tensor]]:
    """(loss, what gives the statistics [7], factors) of all samples, with the KL to a reference."""
    if Q_reference is not None:
        kl = Q_reference * (objective.unit / 2)
        loss = torch.add(loss, kl, alpha=objective.kl_weight)
        factors = [*factors, torch.ones_like(ratio) * (factor * (objective.kl_weight * 0.5))]
    # The caller may change its own weights, and losses that it was given.
    w = w.clone() if isinstance(w, Tensor) else w
    weighted = loss * w
    return (
        weighted.clone() if per_sample else weighted.sum(),
        partial(_sums, ratio, shares, weighted, kl, w),
        factors,
    )


def _sums(ratio: Tensor, shares: list[Tensor], weighted: Tensor, kl: Tensor, w: Coefficient) -> Tensor:
    """The statistics [7] of all samples."""
    one = torch.ones_like(ratio)
    columns = torch.stack([ratio, shares[0], kl, shares[1] if len(shares) == 2 else torch.zeros_like(one), one]) * w
    *sums, weight = columns.sum(1)
    deviation = torch.linalg.vector_norm(ratio - 1.0, torch.inf, 0)
    if not isinstance(w, Tensor) and w <= 0:
        deviation = torch.zeros_like(deviation)
    return torch.stack([*sums, weighted.sum(), weight, deviation])


def launch_clipped_loss(
    P: Tensor,
    Q: Tensor | None,
    s: Coefficient,
    advantages: Tensor,
    weight: Coefficient,
    Q_reference: Tensor | None,
    objective: Objective,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton path: one launch."""
    from .kernel import WARPS, _clipped_loss_kernel

    batch, device = P.shape[0], P.device
    loss, outputs = empty_outputs(batch, device, 1 if Q is None else 2, Q_reference is not None, per_sample)
    moments = (None if m is None else m.contiguous() for m in (P, Q, Q_reference))
    s = kernel_scalar(s)
    arguments, constants = objective_arguments(objective, advantages, weight, batch)
    constants |= coefficient_steps("s", (s,))
    launch(_clipped_loss_kernel, 1, device, *outputs, *moments, s, *arguments, **constants, num_warps=WARPS)
    return loss, outputs[2], outputs[3]


def empty_outputs(
    batch: int, device: torch.device, moments: int, has_reference: bool, per_sample: bool
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor, Tensor]]:
    """(the loss, the outputs as kernels take them: loss, losses, statistics, factors)."""
    loss = torch.empty((batch,) if per_sample else (), dtype=torch.float32, device=device)
    statistics = torch.empty(len(FIELDS), dtype=torch.float32, device=device)
    factors = torch.empty((3 if has_reference else moments, batch), dtype=torch.float32, device=device)
    return loss, (None if per_sample else loss, loss if per_sample else None, statistics, factors)


def objective_arguments(
    objective: Objective, advantages: Tensor, weight: Coefficient, batch: int
) -> tuple[list[object], dict[str, object]]:
    """Arguments of the kernels of the loss from the advantages to the number of terms, and their constants."""
    from .kernel import ROWS

    advantages = advantages.float()
    terms, term_step = (1, 0) if advantages.ndim == 1 else (advantages.shape[1], advantages.stride(1))
    weight = kernel_scalar(weight)
    numbers = objective.dual_clip, objective.dppo_threshold, objective.kl_weight, objective.unit
    # Of the ratio, or of DiffusionNFT's advantages.
    around = 0.0 if objective.ratio == "nft" else 1.0
    arguments = [advantages, weight, around - objective.clip_low, around + objective.clip_high, *numbers, batch, terms]
    constants = {
        "advantages_step": advantages.stride(0),
        "term_step": term_step,
        **coefficient_steps(["weight"], (weight,)),
    }
    return arguments, {**constants, "RATIO": objective.ratio, "ROWS": ROWS}


def gradients_of(grad: Tensor, factors: Tensor, has_q: bool, has_reference: bool) -> list[Tensor | None]:
    """Gradients of P, Q and Q_reference."""
    scaled = (grad * factors).unbind(0)
    return [scaled[0], scaled[1] if has_q else None, scaled[2] if has_reference else None]


class _ClippedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P, Q, s, advantages, weight, Q_reference, objective, per_sample, kept):
        loss, statistics, factors = _forward(P, Q, s, advantages, weight, Q_reference, objective, per_sample)
        kept.append(statistics)
        ctx.save_for_backward(factors)
        ctx.has = Q is not None, Q_reference is not None
        return loss

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("clipped_loss")
        (factors,) = ctx.saved_tensors
        by_p, by_q, by_reference = gradients_of(grads[0], factors, *ctx.has)
        return by_p, by_q, None, None, None, by_reference, None, None, None


@torch.library.custom_op("fastgrpo_kernels::clipped_loss", mutates_args=())
def _clipped_loss_op(
    P: Tensor,
    Q: Tensor | None,
    s: Tensor,
    advantages: Tensor,
    weight: Tensor,
    Q_reference: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    dppo_threshold: float | None,
    kl_weight: float,
    unit: float,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check_traced(s=s, advantages=advantages, weight=weight)
    objective = Objective(ratio, clip_low, clip_high, dual_clip, dppo_threshold, kl_weight, unit)
    loss, statistics, factors = _forward(P, Q, s, advantages, weight, Q_reference, objective, per_sample)
    return loss, computed(statistics), factors


@_clipped_loss_op.register_fake
def _(P, Q, s, advantages, weight, Q_reference, *rest):
    per_sample = len(rest) == len(Objective._fields) + 1 and rest[-1]
    loss, outputs = empty_outputs(P.shape[0], P.device, 1 if Q is None else 2, Q_reference is not None, per_sample)
    return loss, outputs[2], outputs[3]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.has = inputs[1] is not None, inputs[5] is not None
    ctx.rest = len(inputs) - 6


def _op_backward(ctx, grad, *unused):
    refuse_double_backward("clipped_loss")
    (factors,) = ctx.saved_tensors
    by_p, by_q, by_reference = gradients_of(grad, factors, *ctx.has)
    return by_p, by_q, None, None, None, by_reference, *[None] * ctx.rest


_clipped_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
