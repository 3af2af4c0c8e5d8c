"""Triton kernel of the on-policy gradient: one launch that writes the gradient and reads nothing of a latent's size."""

import triton
import triton.language as tl

from ..gaussian_step.kernel import load_deviation, load_scalar
from ..shift_moments.kernel import load_noise


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _on_policy_gradient_kernel(
    grad_ptr,
    advantage_weight_ptr,
    b,
    s,
    eps_ptr,
    words_ptr,
    seed_low,
    seed_high,
    eps_stride,
    elements,
    blocks,
    advantage_step,
    b_step,
    s_step,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    scale = tl.div_rn(load_scalar(b, row, b_step), load_deviation(s, row, s_step))
    factor = -load_scalar(advantage_weight_ptr, row, advantage_step) * tl.div_rn(scale, tl.cast(elements, tl.float32))
    eps = load_noise(eps_ptr, words_ptr, row, block, seed_low, seed_high, eps_stride, elements, mask, BLOCK)
    tl.store(grad_ptr + row * elements + start + offsets, (factor * eps).to(grad_ptr.dtype.element_ty), mask=mask)
