"""Triton epilogue of the policy loss: from the moments of all samples to the loss, in one program of one launch.

Rows are taken in tiles of fixed size, one a thread, and added in fixed order. Work is [B]-sized, so one program
suffices; hyper-parameters are run-time numbers, only the form of the objective is compiled in.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_scalar

# Constants of the numerics: one row a thread.
ROWS, WARPS = 512, 16


@triton.jit
def _load_rows(value, rows, present, PER_ROW: tl.constexpr):
    """A per-sample coefficient of these rows in float32: elements of a pointer, or a number; 1 beyond the batch."""
    if PER_ROW:
        return tl.load(value + rows, mask=present, other=1.0)
    else:
        return tl.zeros_like(rows).to(tl.float32) + load_scalar(value, 0, False)


@triton.jit
def _log_ratio(p, q, s, RATIO: tl.constexpr):
    """(log-ratio, its derivative by P, by Q)."""
    one = tl.full(p.shape, 1.0, tl.float32)
    if RATIO == "ratio_norm":
        return s * p, s, 0.0 * one
    elif RATIO == "unit":
        return 2.0 * s * s * (p - 0.5 * q), 2.0 * s * s, -s * s
    else:
        return p - 0.5 * q, one, -0.5 * one


@triton.jit
def _surrogate(ratio, q, advantage, low, high, dual_clip, dppo_threshold):
    """(loss, its derivative by the log-ratio, was clipped, was dropped) of each row, before the KL."""
    unclipped = -advantage * ratio
    clamped = tl.minimum(tl.maximum(ratio, low, propagate_nan=tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
    clipped = -advantage * clamped
    loss = tl.maximum(unclipped, clipped, propagate_nan=tl.PropagateNan.ALL)
    was_clipped = clipped > unclipped
    slope = tl.where(was_clipped, 0.0, unclipped)
    if dual_clip is not None:
        bound = -advantage * tl.cast(dual_clip, tl.float32)
        above, equal = (advantage < 0) & (loss > bound), (advantage < 0) & (loss == bound)
        # At a tie autograd of minimum gives each side half.
        slope = tl.where(above, 0.0, tl.where(equal, 0.5 * slope, slope))
        loss = tl.where(above, bound, loss)
    was_dropped = was_clipped & False
    if dppo_threshold is not None:
        outwards = ((ratio > 1.0) & (advantage > 0)) | ((ratio < 1.0) & (advantage < 0))
        was_dropped = outwards & (0.5 * q >= tl.cast(dppo_threshold, tl.float32))
        loss, slope = tl.where(was_dropped, 0.0, loss), tl.where(was_dropped, 0.0, slope)
    return loss, slope, was_clipped, was_dropped


@triton.jit(do_not_specialize=["batch"])
def _clipped_loss_kernel(
    loss_ptr,
    statistics_ptr,
    factors_ptr,
    p_ptr,
    q_ptr,
    q_reference_ptr,
    s,
    advantage,
    weight,
    low,
    high,
    dual_clip,
    dppo_threshold,
    kl_weight,
    unit,
    batch,
    RATIO: tl.constexpr,
    S_PER_ROW: tl.constexpr,
    A_PER_ROW: tl.constexpr,
    W_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
):
    zero = tl.zeros([ROWS], tl.float32)
    total_loss, total_ratio, total_clipped, total_kl = zero, zero, zero, zero
    total_dropped, total_weight, deviation = zero, zero, zero
    low, high, unit = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(unit, tl.float32)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        present = rows < batch
        step = _load_rows(s, rows, present, S_PER_ROW)
        if S_PER_ROW:
            step = tl.where(step > 0.0, step, float("nan"))
        adv = _load_rows(advantage, rows, present, A_PER_ROW)
        w = tl.where(present, _load_rows(weight, rows, present, W_PER_ROW), 0.0)
        p = tl.load(p_ptr + rows, mask=present, other=0.0)
        q = tl.load(q_ptr + rows, mask=present, other=0.0)
        p, q = p * unit, q * unit
        log_ratio, by_p, by_q = _log_ratio(p, q, step, RATIO)
        ratio = tl.exp(log_ratio)
        loss, slope, was_clipped, was_dropped = _surrogate(ratio, q, adv, low, high, dual_clip, dppo_threshold)
        tl.store(factors_ptr + rows, w * slope * by_p * unit, mask=present)
        tl.store(factors_ptr + batch + rows, w * slope * by_q * unit, mask=present)
        kl = 0.5 * q
        if q_reference_ptr is not None:
            kl = 0.5 * unit * tl.load(q_reference_ptr + rows, mask=present, other=0.0)
            weight_kl = tl.cast(kl_weight, tl.float32)
            loss += weight_kl * kl
            tl.store(factors_ptr + 2 * batch + rows, w * weight_kl * 0.5 * unit, mask=present)
        total_ratio += tl.where(present, w * ratio, 0.0)
        total_clipped += tl.where(was_clipped, w, 0.0)
        total_kl += tl.where(present, w * kl, 0.0)
        total_dropped += tl.where(was_dropped, w, 0.0)
        total_loss += tl.where(present, w * loss, 0.0)
        total_weight += w
        distance = tl.where(w > 0, tl.abs(ratio - 1.0), 0.0)
        deviation = tl.maximum(deviation, distance, propagate_nan=tl.PropagateNan.ALL)
    summed = tl.sum(total_loss)
    tl.store(loss_ptr, summed)
    tl.store(statistics_ptr, tl.sum(total_ratio))
    tl.store(statistics_ptr + 1, tl.sum(total_clipped))
    tl.store(statistics_ptr + 2, tl.sum(total_kl))
    tl.store(statistics_ptr + 3, tl.sum(total_dropped))
    tl.store(statistics_ptr + 4, summed)
    tl.store(statistics_ptr + 5, tl.sum(total_weight))
    # A NaN must survive the reduction.
    largest = tl.where(tl.sum(deviation) != tl.sum(deviation), float("nan"), tl.max(deviation))
    tl.store(statistics_ptr + 6, largest)
