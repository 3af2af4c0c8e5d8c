"""Triton kernels of the shift moments.

Forward: each program reduces one block of one row to its partial sums of d·ε, d², and (d to a reference)² in slots of
its own, before the factors b/s; a second launch adds a row's partials in fixed order. Backward: one launch, one read of
each latent, one write of each gradient. Pointers that are None are compiled out.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_block, load_guided, load_scalar
from ..noise_kernel import normal_block


@triton.jit
def load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK: tl.constexpr):
    """ε of one block, from the key or from memory."""
    if words_ptr is not None:
        return normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    else:
        return load_block(eps_ptr, row, eps_stride, block.to(tl.int64) * BLOCK, mask, BLOCK)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _shift_moments_fwd_kernel(
    partials_ptr,
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
    a,
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
    slots = partials_ptr + pid.to(tl.int64) * (2 if v_reference_ptr is None else 3)
    scale = load_scalar(guidance, row, G_PER_ROW)
    v = load_guided(v_ptr, v_uncond_ptr, scale, row, v_stride, v_uncond_stride, start, mask, BLOCK)
    if v_reference_ptr is not None:
        reference = v - load_block(v_reference_ptr, row, v_reference_stride, start, mask, BLOCK)
        tl.store(slots + 2, tl.sum(reference * reference))
    v_old = load_block(v_old_ptr, row, v_old_stride, start, mask, BLOCK)
    shift = v - v_old
    if y_ptr is not None:
        residual = load_block(y_ptr, row, y_stride, start, mask, BLOCK)
        residual -= load_scalar(a, row, A_PER_ROW) * load_block(x_ptr, row, x_stride, start, mask, BLOCK)
        residual -= load_scalar(b, row, B_PER_ROW) * v_old
        eps = residual * tl.div_rn(1.0, load_scalar(s, row, S_PER_ROW))
    else:
        eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK)
    # Beyond the row both operands are zero.
    tl.store(slots, tl.sum(shift * eps))
    tl.store(slots + 1, tl.sum(shift * shift))


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
    a,
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
    s = load_scalar(s, row, S_PER_ROW)
    b = load_scalar(b, row, B_PER_ROW)
    scale = tl.div_rn(b, s)
    per_element = tl.div_rn(scale, tl.cast(elements, tl.float32))
    if grad_ptr is not None:
        per_element *= tl.load(grad_ptr)
    factor_eps = tl.load(grad_p_ptr + row) * per_element
    guidance = load_scalar(guidance, row, G_PER_ROW)
    v = load_guided(v_ptr, v_uncond_ptr, guidance, row, v_stride, v_uncond_stride, start, mask, BLOCK)
    v_old = load_block(v_old_ptr, row, v_old_stride, start, mask, BLOCK)
    grad = 2.0 * tl.load(grad_q_ptr + row) * scale * per_element * (v - v_old)
    if v_reference_ptr is not None:
        factor_reference = 2.0 * tl.load(grad_reference_ptr + row) * scale * per_element
        grad += factor_reference * (v - load_block(v_reference_ptr, row, v_reference_stride, start, mask, BLOCK))
    if y_ptr is not None:
        residual = load_block(y_ptr, row, y_stride, start, mask, BLOCK)
        residual -= load_scalar(a, row, A_PER_ROW) * load_block(x_ptr, row, x_stride, start, mask, BLOCK)
        grad += factor_eps * (tl.div_rn(1.0, s) * (residual - b * v_old))
    else:
        eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, mask, BLOCK)
        grad += factor_eps * eps
    out = row * elements + start + offsets
    if v_uncond_ptr is not None:
        tl.store(grad_v_uncond_ptr + out, ((1.0 - guidance) * grad).to(grad_v_ptr.dtype.element_ty), mask=mask)
        grad *= guidance
    tl.store(grad_v_ptr + out, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)
