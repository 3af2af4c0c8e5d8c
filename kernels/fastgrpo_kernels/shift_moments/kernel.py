"""Triton kernels of the shift moments.

Forward: each program reduces one block of one row to a pair of partial sums in its own slot; a second launch adds a
row's partials in fixed order. Backward: one launch, one read of v and v_old, one write of the gradient.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_scalar
from ..noise_kernel import normal_block


@triton.jit
def load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK: tl.constexpr):
    if words_ptr is not None:
        return normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    else:
        start = row * eps_stride + block.to(tl.int64) * BLOCK
        return tl.load(eps_ptr + start + tl.arange(0, BLOCK), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _shift_moments_fwd_kernel(
    partials_ptr,
    v_ptr,
    v_old_ptr,
    eps_ptr,
    words_ptr,
    seed_low,
    seed_high,
    v_stride,
    v_old_stride,
    eps_stride,
    elements,
    blocks,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    v = tl.load(v_ptr + row * v_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    v_old = tl.load(v_old_ptr + row * v_old_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    shift = v - v_old
    eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK)
    # Beyond the row both operands are zero.
    tl.store(partials_ptr + pid.to(tl.int64) * 2, tl.sum(shift * eps))
    tl.store(partials_ptr + pid.to(tl.int64) * 2 + 1, tl.sum(shift * shift))


@triton.jit
def _shift_moments_sum_kernel(
    p_ptr,
    q_ptr,
    partials_ptr,
    b,
    s,
    elements,
    blocks,
    B_PER_ROW: tl.constexpr,
    S_PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, TILE)
    p = tl.zeros([TILE], tl.float32)
    q = tl.zeros([TILE], tl.float32)
    for start in range(0, blocks, TILE):
        mask = start + offsets < blocks
        slot = partials_ptr + (row * blocks + start + offsets) * 2
        p += tl.load(slot, mask=mask, other=0.0)
        q += tl.load(slot + 1, mask=mask, other=0.0)
    scale = tl.div_rn(load_scalar(b, row, B_PER_ROW), load_scalar(s, row, S_PER_ROW))
    count = tl.cast(elements, tl.float32)
    tl.store(p_ptr + row, tl.div_rn(scale * tl.sum(p), count))
    tl.store(q_ptr + row, tl.div_rn(scale * scale * tl.sum(q), count))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _shift_moments_bwd_kernel(
    grad_v_ptr,
    grad_p_ptr,
    grad_q_ptr,
    v_ptr,
    v_old_ptr,
    b,
    s,
    eps_ptr,
    words_ptr,
    seed_low,
    seed_high,
    v_stride,
    v_old_stride,
    eps_stride,
    elements,
    blocks,
    B_PER_ROW: tl.constexpr,
    S_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    scale = tl.div_rn(load_scalar(b, row, B_PER_ROW), load_scalar(s, row, S_PER_ROW))
    per_element = tl.div_rn(scale, tl.cast(elements, tl.float32))
    factor_eps = tl.load(grad_p_ptr + row) * per_element
    factor_shift = 2.0 * tl.load(grad_q_ptr + row) * scale * per_element
    v = tl.load(v_ptr + row * v_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    v_old = tl.load(v_old_ptr + row * v_old_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK)
    grad = factor_eps * eps + factor_shift * (v - v_old)
    tl.store(grad_v_ptr + row * elements + start + offsets, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)
