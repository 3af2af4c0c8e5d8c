"""Triton kernels of the shift moments.

Forward: each program reduces one block of one row to its partial sums of d·ε, d², and (d to a reference)² in slots of
its own, before the factors b/s; the last program of a row adds them in fixed order. Backward: one read of each latent,
one write of each gradient. One launch each. Pointers that are None are compiled out.
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


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _shift_moments_fwd_kernel(
    p_ptr,
    q_ptr,
    q_reference_ptr,
    partials_ptr,
    arrivals_ptr,
    v_ptr,
    v_old_ptr,
    v_uncond_ptr,
    v_reference_ptr,
    eps_ptr,
    x_ptr,
    y_ptr,
    words_ptr,
    seed_low,
    seed_high,
    a_less_one,
    b,
    s,
    guidance,
    v_stride,
    v_old_stride,
    v_uncond_stride,
    v_reference_stride,
    eps_stride,
    x_stride,
    y_stride,
    elements,
    blocks,
    A_PER_ROW: tl.constexpr,
    B_PER_ROW: tl.constexpr,
    S_PER_ROW: tl.constexpr,
    G_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    mask = tl.arange(0, BLOCK) < elements - start
    programs = tl.num_programs(0).to(tl.int64)
    scale = load_scalar(guidance, row, G_PER_ROW)
    if y_ptr is not None:
        inverse_s = tl.div_rn(1.0, load_deviation(s, row, S_PER_ROW))
        a_less_one = load_scalar(a_less_one, row, A_PER_ROW)
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
        eps = (move - load_scalar(b, row, B_PER_ROW) * v_old) * inverse_s
    else:
        eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK)
    # Beyond the row both operands are zero.
    tl.store(partials_ptr + pid, tl.sum(shift * eps))
    tl.store(partials_ptr + programs + pid, tl.sum(shift * shift))
    if is_last_of_row(arrivals_ptr, row, blocks):
        scale = tl.div_rn(load_scalar(b, row, B_PER_ROW), load_deviation(s, row, S_PER_ROW))
        count = tl.cast(elements, tl.float32)
        tl.store(p_ptr + row, tl.div_rn(scale * sum_slots(partials_ptr, row, blocks), count))
        square = scale * scale
        tl.store(q_ptr + row, tl.div_rn(square * sum_slots(partials_ptr + programs, row, blocks), count))
        if v_reference_ptr is not None:
            total = sum_slots(partials_ptr + 2 * programs, row, blocks)
            tl.store(q_reference_ptr + row, tl.div_rn(square * total, count))


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
    words_ptr,
    seed_low,
    seed_high,
    a_less_one,
    b,
    s,
    guidance,
    v_stride,
    v_old_stride,
    v_uncond_stride,
    v_reference_stride,
    eps_stride,
    x_stride,
    y_stride,
    elements,
    blocks,
    A_PER_ROW: tl.constexpr,
    B_PER_ROW: tl.constexpr,
    S_PER_ROW: tl.constexpr,
    G_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    s = load_deviation(s, row, S_PER_ROW)
    b = load_scalar(b, row, B_PER_ROW)
    scale = tl.div_rn(b, s)
    per_element = tl.div_rn(scale, tl.cast(elements, tl.float32))
    if grad_ptr is not None:
        per_element *= tl.load(grad_ptr)
    factor_eps = tl.load(grad_p_ptr + row) * per_element
    factor_change = 2.0 * tl.load(grad_q_ptr + row) * scale * per_element
    guidance = load_scalar(guidance, row, G_PER_ROW)
    if y_ptr is not None:
        factor_eps *= tl.div_rn(1.0, s)
        a_less_one = load_scalar(a_less_one, row, A_PER_ROW)
        # One sum, to which each latent is added as it arrives: few of them are in registers at a time.
        grad = factor_eps * load_move(y_ptr, x_ptr, a_less_one, row, y_stride, x_stride, elements, start, mask, BLOCK)
    else:
        grad = factor_eps * load_noise(
            eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK
        )
    v_old = load_block(v_old_ptr, row, v_old_stride, elements, start, mask, BLOCK)
    if y_ptr is not None:
        grad -= factor_eps * b * v_old
    v = load_guided(v_ptr, v_uncond_ptr, guidance, row, v_stride, v_uncond_stride, elements, start, mask, BLOCK)
    grad += factor_change * (v - v_old)
    if v_reference_ptr is not None:
        factor_reference = 2.0 * tl.load(grad_reference_ptr + row) * scale * per_element
        tl.debug_barrier()
        grad += factor_reference * (
            v - load_block(v_reference_ptr, row, v_reference_stride, elements, start, mask, BLOCK)
        )
    out = row * elements + start + offsets
    if v_uncond_ptr is not None:
        tl.store(grad_v_uncond_ptr + out, ((1.0 - guidance) * grad).to(grad_v_ptr.dtype.element_ty), mask=mask)
        grad *= guidance
    tl.store(grad_v_ptr + out, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)
