"""Triton kernel of the Gaussian step: one program per block of one row, one read of x and v, one write of y."""

import triton
import triton.language as tl

from ..noise_kernel import normal_block


@triton.jit
def load_scalar(value, row, PER_ROW: tl.constexpr):
    """A per-sample coefficient in float32: element `row` of a pointer, or a number."""
    if PER_ROW:
        return tl.load(value + row)
    else:
        return tl.cast(value, tl.float32)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _gaussian_step_kernel(
    y_ptr,
    x_ptr,
    v_ptr,
    a,
    b,
    s,
    eps_ptr,
    words_ptr,
    seed_low,
    seed_high,
    x_stride,
    v_stride,
    eps_stride,
    elements,
    blocks,
    A_PER_ROW: tl.constexpr,
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
    x = tl.load(x_ptr + row * x_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y = load_scalar(a, row, A_PER_ROW) * x + load_scalar(b, row, B_PER_ROW) * v
    if words_ptr is not None:
        y += load_scalar(s, row, S_PER_ROW) * normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    elif eps_ptr is not None:
        eps = tl.load(eps_ptr + row * eps_stride + start + offsets, mask=mask, other=0.0).to(tl.float32)
        y += load_scalar(s, row, S_PER_ROW) * eps
    tl.store(y_ptr + row * elements + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
