"""Triton kernels of the policy loss: from the moments of all samples, or from the latents themselves, in one launch.

Rows are taken in tiles of fixed size and added in fixed order. Work is [B]-sized, so one program suffices: the only
one, or the last of the many that read the latents. Hyper-parameters are run-time numbers, only the form of the
objective is compiled in.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_scalar
from ..reduction import is_last_of_row
from ..shift_moments.kernel import store_moments, store_partial_sums

# Constants of the numerics: one row a thread where there are fewest threads.
ROWS, WARPS = 128, 4


@triton.jit
def _load_rows(value, rows, present, step):
    """A per-sample coefficient of these rows in float32: elements of a pointer, or a number; 1 beyond the batch."""
    if step is None:
        return tl.zeros_like(rows).to(tl.float32) + load_scalar(value, 0, None)
    else:
        return tl.load(value + rows * step, mask=present, other=1.0)


@triton.jit
def _log_ratio(p, q, s, before, RATIO: tl.constexpr):
    """(log-ratio, its derivative by P, by Q); `before` is the old output's squared residual."""
    one = tl.full(p.shape, 1.0, tl.float32)
    moved = 2.0 * p + q
    if RATIO == "ratio_norm":
        return s * p, s, 0.0 * one
    elif RATIO == "unit":
        return 2.0 * s * s * (p - 0.5 * q), 2.0 * s * s, -s * s
    elif RATIO == "matching":
        return -s * moved, -2.0 * s, -s
    elif RATIO == "nft":
        return -s * s * moved, -2.0 * s * s, -s * s
    elif RATIO == "huber":
        # The difference of the two roots, which subtracting them would lose where the policy has hardly moved.
        root = tl.sqrt_rn(tl.maximum(before + moved + 1e-10, 0.0, propagate_nan=tl.PropagateNan.ALL))
        log_ratio = tl.div_rn(-s * moved, root + tl.sqrt_rn(before + 1e-10))
        return log_ratio, tl.div_rn(-s, root), tl.div_rn(-0.5 * s, root)
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


@triton.jit
def store_loss(
    loss_ptr,
    losses_ptr,
    statistics_ptr,
    factors_ptr,
    p_ptr,
    q_ptr,
    q_reference_ptr,
    share_ptr,
    residuals_ptr,
    residuals,
    s,
    advantages_ptr,
    weight,
    low,
    high,
    dual_clip,
    dppo_threshold,
    kl_weight,
    unit,
    batch,
    terms,
    s_step,
    advantages_step,
    term_step,
    weight_step,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss, statistics and gradient factors of all rows, by one program, in fixed order.

    A row has `terms` advantages: as many clipped losses, summed. `share` multiplies the factors where moments are means
    over a mask. `residuals_ptr` [3, batch] are R and the two mean absolute residuals, whose factor β is `residuals`.
    A row of weight 0 has no part in anything, whatever its moments are.
    """
    zero = tl.zeros([ROWS], tl.float32)
    total_loss, total_ratio, total_clipped, total_kl = zero, zero, zero, zero
    total_dropped, total_weight, deviation = zero, zero, zero
    low, high, unit = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(unit, tl.float32)
    number = tl.cast(terms, tl.float32)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        present = rows < batch
        w = tl.where(present, _load_rows(weight, rows, present, weight_step), 0.0)
        counts = w != 0.0
        p = tl.load(p_ptr + rows, mask=present, other=0.0) * unit
        q = tl.zeros([ROWS], tl.float32)
        if q_ptr is not None:
            q = tl.load(q_ptr + rows, mask=present, other=0.0) * unit
        step = zero
        if RATIO != "gaussian":
            step = _load_rows(s, rows, present, s_step)
            if s_step is not None:
                step = tl.where(step > 0.0, step, float("nan"))
        before = zero
        if residuals_ptr is not None:
            before = tl.load(residuals_ptr + rows, mask=present, other=1.0) * unit
        log_ratio, by_p, by_q = _log_ratio(p, q, step, before, RATIO)
        ratio = tl.exp(log_ratio)
        loss, slope, clipped, dropped = zero, zero, zero, zero
        for term in range(0, terms):
            advantage = tl.load(advantages_ptr + rows * advantages_step + term * term_step, mask=present, other=1.0)
            if RATIO == "nft":
                inside = tl.minimum(tl.maximum(advantage, low), high)
                # For now the share of the positive branch.
                loss += tl.div_rn(inside - low, high - low)
                clipped += (inside != advantage).to(tl.float32)
            else:
                one, its_slope, was_clipped, was_dropped = _surrogate(  # pyright: ignore[reportGeneralTypeIssues]
                    ratio, q, advantage, low, high, dual_clip, dppo_threshold
                )
                loss += one
                slope += its_slope
                clipped += was_clipped.to(tl.float32)
                dropped += was_dropped.to(tl.float32)
        if RATIO == "nft":
            beta = tl.cast(residuals, tl.float32)
            positive = tl.load(residuals_ptr + batch + rows, mask=present, other=1.0)
            negative = tl.load(residuals_ptr + 2 * batch + rows, mask=present, other=1.0)
            up = tl.div_rn(loss, tl.maximum(step * positive, 1e-5, propagate_nan=tl.PropagateNan.ALL))
            down = tl.div_rn(number - loss, tl.maximum(step * negative, 1e-5, propagate_nan=tl.PropagateNan.ALL))
            scale = step * step * high
            by_p, by_q = 2.0 * scale * (up - down), scale * beta * (up + down)
            loss = tl.div_rn(scale, beta) * (up + down) * before + by_p * p + by_q * q
            slope = zero + 1.0
        factor = unit * w
        if share_ptr is not None:
            factor *= tl.load(share_ptr + rows, mask=present, other=1.0)
        slope = tl.where(counts, slope * factor, 0.0)
        tl.store(factors_ptr + rows, slope * by_p, mask=present)
        if q_ptr is not None:
            tl.store(factors_ptr + batch + rows, slope * by_q, mask=present)
        kl = 0.5 * q
        if q_reference_ptr is not None:
            kl = 0.5 * unit * tl.load(q_reference_ptr + rows, mask=present, other=0.0)
            weight_kl = tl.cast(kl_weight, tl.float32)
            loss += weight_kl * kl
            tl.store(factors_ptr + 2 * batch + rows, tl.where(counts, 0.5 * weight_kl * factor, 0.0), mask=present)
        loss = tl.where(counts, w * loss, 0.0)
        if losses_ptr is not None:
            tl.store(losses_ptr + rows, loss, mask=present)
        total_loss += loss
        total_ratio += tl.where(counts, w * ratio, 0.0)
        total_clipped += w * clipped
        total_kl += tl.where(counts, w * kl, 0.0)
        total_dropped += w * dropped
        total_weight += w
        distance = tl.where(w > 0, tl.abs(ratio - 1.0), 0.0)
        deviation = tl.maximum(deviation, distance, propagate_nan=tl.PropagateNan.ALL)
    summed = tl.sum(total_loss)
    if loss_ptr is not None:
        tl.store(loss_ptr, summed)
    tl.store(statistics_ptr, tl.sum(total_ratio))
    tl.store(statistics_ptr + 1, tl.div_rn(tl.sum(total_clipped), number))
    tl.store(statistics_ptr + 2, tl.sum(total_kl))
    tl.store(statistics_ptr + 3, tl.div_rn(tl.sum(total_dropped), number))
    tl.store(statistics_ptr + 4, summed)
    tl.store(statistics_ptr + 5, tl.sum(total_weight))
    # A NaN must survive the reduction.
    largest = tl.where(tl.sum(deviation) != tl.sum(deviation), float("nan"), tl.max(deviation))
    tl.store(statistics_ptr + 6, largest)


@triton.jit(do_not_specialize=["batch"])
def _clipped_loss_kernel(
    loss_ptr,
    losses_ptr,
    statistics_ptr,
    factors_ptr,
    p_ptr,
    q_ptr,
    q_reference_ptr,
    s,
    advantages_ptr,
    weight,
    low,
    high,
    dual_clip,
    dppo_threshold,
    kl_weight,
    unit,
    batch,
    terms,
    s_step,
    advantages_step,
    term_step,
    weight_step,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
):
    store_loss(
        loss_ptr,
        losses_ptr,
        statistics_ptr,
        factors_ptr,
        p_ptr,
        q_ptr,
        q_reference_ptr,
        None,
        None,
        None,
        s,
        advantages_ptr,
        weight,
        low,
        high,
        dual_clip,
        dppo_threshold,
        kl_weight,
        unit,
        batch,
        terms,
        s_step,
        advantages_step,
        term_step,
        weight_step,
        RATIO,
        ROWS,
    )


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks", "batch"])
def _grpo_loss_fwd_kernel(
    loss_ptr,
    losses_ptr,
    statistics_ptr,
    factors_ptr,
    advantages_ptr,
    weight,
    low,
    high,
    dual_clip,
    dppo_threshold,
    kl_weight,
    unit,
    batch,
    terms,
    partials_ptr,
    arrivals_ptr,
    v_ptr,
    v_old_ptr,
    v_uncond_ptr,
    v_reference_ptr,
    eps_ptr,
    x_ptr,
    y_ptr,
    x0_ptr,
    mask_ptr,
    words_ptr,
    seed_low,
    seed_high,
    a_less_one,
    b,
    s,
    guidance,
    noise_scale,
    x0_scale,
    residuals,
    v_stride,
    v_old_stride,
    v_uncond_stride,
    v_reference_stride,
    eps_stride,
    x_stride,
    y_stride,
    x0_stride,
    mask_stride,
    mask_inner,
    mask_length,
    elements,
    blocks,
    a_step,
    b_step,
    s_step,
    g_step,
    n_step,
    c_step,
    advantages_step,
    term_step,
    weight_step,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
    MEAN_OF_MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums by every program, a row's moments by its last one, the loss by the last of these."""
    store_partial_sums(
        partials_ptr,
        v_ptr,
        v_old_ptr,
        v_uncond_ptr,
        v_reference_ptr,
        eps_ptr,
        x_ptr,
        y_ptr,
        x0_ptr,
        mask_ptr,
        words_ptr,
        seed_low,
        seed_high,
        a_less_one,
        b,
        s,
        guidance,
        noise_scale,
        x0_scale,
        residuals,
        v_stride,
        v_old_stride,
        v_uncond_stride,
        v_reference_stride,
        eps_stride,
        x_stride,
        y_stride,
        x0_stride,
        mask_stride,
        mask_inner,
        mask_length,
        elements,
        blocks,
        a_step,
        b_step,
        s_step,
        g_step,
        n_step,
        c_step,
        BLOCK,
    )
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if is_last_of_row(arrivals_ptr, row, blocks):
        # The workspace: SLOTS partial sums of every program, then as many moments of every row.
        p_ptr = partials_ptr + SLOTS * tl.num_programs(0).to(tl.int64)
        q_ptr = p_ptr + batch
        q_reference_ptr = q_ptr + batch
        share_ptr = q_reference_ptr + batch
        residuals_ptr = share_ptr + batch
        if v_reference_ptr is None:
            q_reference_ptr = None
        if not MEAN_OF_MASKED:
            share_ptr = None
        if residuals is None:
            residuals_ptr = None
        store_moments(
            p_ptr,
            q_ptr,
            q_reference_ptr,
            share_ptr,
            residuals_ptr,
            partials_ptr,
            row,
            elements,
            blocks,
            b,
            s,
            b_step,
            s_step,
            MEAN_OF_MASKED,
        )
        # The counter after those of the rows counts rows.
        if is_last_of_row(arrivals_ptr, batch, batch):
            store_loss(
                loss_ptr,
                losses_ptr,
                statistics_ptr,
                factors_ptr,
                p_ptr,
                q_ptr,
                q_reference_ptr,
                share_ptr,
                residuals_ptr,
                residuals,
                s,
                advantages_ptr,
                weight,
                low,
                high,
                dual_clip,
                dppo_threshold,
                kl_weight,
                unit,
                batch,
                terms,
                s_step,
                advantages_step,
                term_step,
                weight_step,
                RATIO,
                ROWS,
            )
