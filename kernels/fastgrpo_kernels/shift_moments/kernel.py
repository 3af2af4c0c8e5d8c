"""Triton kernels of the shift moments.

Forward: each program reduces one block of one row to partial sums in slots of its own; the last program of a row adds
them in fixed order. Backward: one read of each latent, one write of each gradient. One launch each. Pointers that are
None are compiled out. The loss (`clipped_loss/kernel.py`) shares the forward's two halves.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_block, load_deviation, load_guided, load_scalar
from ..noise_kernel import normal_block
from ..reduction import is_last_of_row, sum_slots


@triton.jit
def load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK: tl.constexpr):
    """ε of one block, from the key or from memory."""
    if words_ptr is not None:
        return normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    else:
        return load_block(eps_ptr, row, eps_stride, elements, block.to(tl.int64) * BLOCK, mask, BLOCK)


@triton.jit
def load_move(y_ptr, x_ptr, a_less_one, row, y_stride, x_stride, elements, start, mask, BLOCK: tl.constexpr):
    """y - a·x of one block of a stored step, as (y - x) - (a - 1)·x: a is near 1, which float32 knows to 6e-8 only.

    The barriers keep registers few: a division is a call, which must not find latents in flight, and the compiler would
    hold four of them at once, more than these two and then the others need.
    """
    tl.debug_barrier()
    y = load_block(y_ptr, row, y_stride, elements, start, mask, BLOCK)
    x = load_block(x_ptr, row, x_stride, elements, start, mask, BLOCK)
    move = (y - x) - a_less_one * x
    tl.debug_barrier()
    return move


@triton.jit
def load_mask(mask_ptr, row, stride, inner, length, start, inside, elements, BLOCK: tl.constexpr):
    """Which elements of a block count: those of the row that a mask, where there is one, selects.

    Element j of a row has the value [j // inner % length] of the row's mask. 64-bit numbers are divided by calls, of 70
    instructions each, and on sm_80 a register was spilled for them: 32 bits do where a row has no more elements. What
    overflows is beyond the row.
    """
    if mask_ptr is not None:
        within = tl.arange(0, BLOCK)
        offsets = (start + within).to((within + elements).dtype) // inner % length
        return inside & (tl.load(mask_ptr + row * stride + offsets, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def store_partial_sums(
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
    BLOCK: tl.constexpr,
):
    """This program's sums of d·ε, d², (d to a reference)², of elements that count, and of e², |e + β·shift| and
    |e - β·shift|, before the factors b/s, into its slots of [7, programs]."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    mask = tl.arange(0, BLOCK) < elements - start
    programs = tl.num_programs(0).to(tl.int64)
    if mask_ptr is not None:
        mask = load_mask(mask_ptr, row, mask_stride, mask_inner, mask_length, start, mask, elements, BLOCK)
        tl.store(partials_ptr + 3 * programs + pid, tl.sum(mask.to(tl.float32)))
    scale = load_scalar(guidance, row, g_step)
    if y_ptr is not None:
        inverse_s = tl.div_rn(1.0, load_deviation(s, row, s_step))
        a_less_one = load_scalar(a_less_one, row, a_step)
        # First, or with a reference last: so registers are fewest.
        if v_reference_ptr is None:
            move = load_move(y_ptr, x_ptr, a_less_one, row, y_stride, x_stride, elements, start, mask, BLOCK)
    v = load_guided(v_ptr, v_uncond_ptr, scale, row, v_stride, v_uncond_stride, elements, start, mask, BLOCK)
    if v_reference_ptr is not None:
        reference = v - load_block(v_reference_ptr, row, v_reference_stride, elements, start, mask, BLOCK)
        tl.store(partials_ptr + 2 * programs + pid, tl.sum(reference * reference))
    v_old = load_block(v_old_ptr, row, v_old_stride, elements, start, mask, BLOCK)
    shift = v - v_old
    if y_ptr is not None:
        if v_reference_ptr is not None:
            move = load_move(y_ptr, x_ptr, a_less_one, row, y_stride, x_stride, elements, start, mask, BLOCK)
        eps = (move - load_scalar(b, row, b_step) * v_old) * inverse_s
    else:
        eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK)
        if x0_ptr is not None:
            x0 = load_block(x0_ptr, row, x0_stride, elements, start, mask, BLOCK)
            target = load_scalar(noise_scale, row, n_step) * eps + load_scalar(x0_scale, row, c_step) * x0
            eps = v_old - target
    if residuals is not None:
        # Noise from a key is everywhere.
        eps = tl.where(mask, eps, 0.0)
        change = tl.cast(residuals, tl.float32) * shift
        tl.store(partials_ptr + 4 * programs + pid, tl.sum(eps * eps))
        tl.store(partials_ptr + 5 * programs + pid, tl.sum(tl.abs(eps + change)))
        tl.store(partials_ptr + 6 * programs + pid, tl.sum(tl.abs(eps - change)))
    # Beyond the row, and where the mask selects nothing, both operands are zero.
    tl.store(partials_ptr + pid, tl.sum(shift * eps))
    tl.store(partials_ptr + programs + pid, tl.sum(shift * shift))


@triton.jit
def store_moments(
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
    MEAN_OF_MASKED: tl.constexpr,
):
    """In the last program of a row: its moments, from the partial sums of all; pointers that are None are not written.

    `share` is elements / (elements that count), by which a mean over the mask is more than one over the row.
    `residuals` [3, batch] are the last three sums.
    """
    programs = tl.num_programs(0).to(tl.int64)
    scale = tl.div_rn(load_scalar(b, row, b_step), load_deviation(s, row, s_step))
    count = tl.cast(elements, tl.float32)
    square = scale * scale
    p = tl.div_rn(scale * sum_slots(partials_ptr, row, blocks), count)
    q = tl.div_rn(square * sum_slots(partials_ptr + programs, row, blocks), count)
    if MEAN_OF_MASKED:
        share = tl.div_rn(count, tl.maximum(sum_slots(partials_ptr + 3 * programs, row, blocks), 1.0))
        tl.store(share_ptr + row, share)
        p, q = p * share, q * share
    tl.store(p_ptr + row, p)
    tl.store(q_ptr + row, q)
    if q_reference_ptr is not None:
        q_reference = tl.div_rn(square * sum_slots(partials_ptr + 2 * programs, row, blocks), count)
        if MEAN_OF_MASKED:
            q_reference *= share
        tl.store(q_reference_ptr + row, q_reference)
    if residuals_ptr is not None:
        for index in tl.static_range(3):  # pyright: ignore
            mean = tl.div_rn(sum_slots(partials_ptr + (4 + index) * programs, row, blocks), count)
            if MEAN_OF_MASKED:
                mean *= share
            tl.store(residuals_ptr + index * (programs // blocks) + row, mean)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _shift_moments_fwd_kernel(
    p_ptr,
    q_ptr,
    share_ptr,
    residuals_ptr,
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
    BLOCK: tl.constexpr,
):
    store_partial_sums(
        partials_ptr,
        v_ptr,
        v_old_ptr,
        v_uncond_ptr,
        None,
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
        store_moments(
            p_ptr,
            q_ptr,
            None,
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
            share_ptr is not None,
        )


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _shift_moments_bwd_kernel(
    grad_v_ptr,
    grad_v_uncond_ptr,
    grad_ptr,
    grad_p_ptr,
    grad_q_ptr,
    grad_reference_ptr,
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
    grad_step,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < elements - start
    mask = load_mask(mask_ptr, row, mask_stride, mask_inner, mask_length, start, inside, elements, BLOCK)
    s = load_deviation(s, row, s_step)
    b = load_scalar(b, row, b_step)
    scale = tl.div_rn(b, s)
    per_element = tl.div_rn(scale, tl.cast(elements, tl.float32))
    if grad_ptr is not None:
        per_element *= load_scalar(grad_ptr, row, grad_step)
    factor_eps = tl.load(grad_p_ptr + row) * per_element
    factor_change = 2.0 * tl.load(grad_q_ptr + row) * scale * per_element
    guidance = load_scalar(guidance, row, g_step)
    if y_ptr is not None:
        factor_eps *= tl.div_rn(1.0, s)
        a_less_one = load_scalar(a_less_one, row, a_step)
        # One sum, to which each latent is added as it arrives: few of them are in registers at a time.
        grad = factor_eps * load_move(y_ptr, x_ptr, a_less_one, row, y_stride, x_stride, elements, start, mask, BLOCK)
    else:
        grad = factor_eps * load_noise(
            eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK
        )
    v_old = load_block(v_old_ptr, row, v_old_stride, elements, start, mask, BLOCK)
    if y_ptr is not None:
        grad -= factor_eps * b * v_old
    if x0_ptr is not None:
        x0 = load_block(x0_ptr, row, x0_stride, elements, start, mask, BLOCK)
        target = load_scalar(noise_scale, row, n_step) * grad + factor_eps * load_scalar(x0_scale, row, c_step) * x0
        grad = factor_eps * v_old - target
    v = load_guided(v_ptr, v_uncond_ptr, guidance, row, v_stride, v_uncond_stride, elements, start, mask, BLOCK)
    grad += factor_change * (v - v_old)
    if v_reference_ptr is not None:
        factor_reference = 2.0 * tl.load(grad_reference_ptr + row) * scale * per_element
        tl.debug_barrier()
        grad += factor_reference * (
            v - load_block(v_reference_ptr, row, v_reference_stride, elements, start, mask, BLOCK)
        )
    if mask_ptr is not None:
        # Noise from a key is everywhere.
        grad = tl.where(mask, grad, 0.0)
    out = row * elements + start + offsets
    if v_uncond_ptr is not None:
        tl.store(grad_v_uncond_ptr + out, ((1.0 - guidance) * grad).to(grad_v_ptr.dtype.element_ty), mask=inside)
        grad *= guidance
    tl.store(grad_v_ptr + out, grad.to(grad_v_ptr.dtype.element_ty), mask=inside)
