"""Triton kernel of the Gaussian step: a program to a block of a row, one read of each input, one write of each output.

Pointers that are None are compiled out.
"""

import triton
import triton.language as tl

from ..noise_kernel import normal_block
from ..reduction import is_last_of_row, sum_slots


@triton.jit
def load_scalar(value, row, step):
    """A per-sample coefficient in float32: element `row` of a pointer with stride `step`, or a number (step None)."""
    if step is None:
        return tl.cast(value, tl.float32)
    else:
        return tl.load(value + row * step)


@triton.jit
def load_deviation(s, row, step):
    """Standard deviation of a density. One on a device is not read before the launch: what is none gives NaN."""
    value = load_scalar(s, row, step)
    if step is not None:
        value = tl.where(value > 0.0, value, float("nan"))
    return value


@triton.jit
def load_block(ptr, row, stride, elements, start, mask, BLOCK: tl.constexpr):
    """One block of one row in float32; zero beyond the row. A stride of None is that of dense rows."""
    if stride is None:
        stride = elements
    # One sum, which the pointers of dense latents share: registers.
    return tl.load(ptr + (row * stride + start + tl.arange(0, BLOCK)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_guided(v_ptr, v_uncond_ptr, scale, row, v_stride, v_uncond_stride, elements, start, mask, BLOCK: tl.constexpr):
    """The model output of one block: v, or the guided v rounded to its storage dtype."""
    v = load_block(v_ptr, row, v_stride, elements, start, mask, BLOCK)
    if v_uncond_ptr is not None:
        uncond = load_block(v_uncond_ptr, row, v_uncond_stride, elements, start, mask, BLOCK)
        # An explicit fma: rollout and replay must round alike.
        v = tl.fma(tl.zeros_like(v) + scale, v - uncond, uncond).to(v_ptr.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def finish_log_prob(log_prob_ptr, partials_ptr, arrivals_ptr, row, s, elements, blocks):
    """In the last program of a row: log-probability from the partial sums of ((y - a·x - b·v)/s)², or without s the
    negative mean square."""
    if is_last_of_row(arrivals_ptr, row, blocks):
        square = tl.div_rn(sum_slots(partials_ptr, row, blocks), tl.cast(elements, tl.float32))
        if s is None:
            tl.store(log_prob_ptr + row, -square)
        else:
            # ½·log 2π
            tl.store(log_prob_ptr + row, -0.5 * square - tl.log(s) - 0.9189385332046727)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _gaussian_step_kernel(
    y_ptr,
    log_prob_ptr,
    partials_ptr,
    arrivals_ptr,
    clean_ptr,
    v_out_ptr,
    x_ptr,
    v_ptr,
    v_uncond_ptr,
    eps_ptr,
    words_ptr,
    seed_low,
    seed_high,
    a,
    b,
    s,
    guidance,
    clean_a,
    clean_b,
    x_stride,
    v_stride,
    v_uncond_stride,
    eps_stride,
    elements,
    blocks,
    a_step,
    b_step,
    s_step,
    g_step,
    clean_a_step,
    clean_b_step,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    out = row * elements + start + offsets
    scale = load_scalar(guidance, row, g_step)
    v = load_guided(v_ptr, v_uncond_ptr, scale, row, v_stride, v_uncond_stride, elements, start, mask, BLOCK)
    x = load_block(x_ptr, row, x_stride, elements, start, mask, BLOCK)
    if v_out_ptr is not None:
        tl.store(v_out_ptr + out, v.to(v_out_ptr.dtype.element_ty), mask=mask)
    if clean_ptr is not None:
        clean = load_scalar(clean_a, row, clean_a_step) * x + load_scalar(clean_b, row, clean_b_step) * v
        tl.store(clean_ptr + out, clean.to(clean_ptr.dtype.element_ty), mask=mask)
    mean = load_scalar(a, row, a_step) * x + load_scalar(b, row, b_step) * v
    y = mean
    if words_ptr is not None:
        y += load_scalar(s, row, s_step) * normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    elif eps_ptr is not None:
        y += load_scalar(s, row, s_step) * load_block(eps_ptr, row, eps_stride, elements, start, mask, BLOCK)
    stored = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + out, stored, mask=mask)
    if partials_ptr is not None:
        # Of the latent as stored; noise does not end with the row.
        step = load_deviation(s, row, s_step)
        z = (stored.to(tl.float32) - mean) * tl.div_rn(1.0, step)
        z = tl.where(mask, z, 0.0)
        tl.store(partials_ptr + pid, tl.sum(z * z))
        finish_log_prob(log_prob_ptr, partials_ptr, arrivals_ptr, row, step, elements, blocks)
