"""Triton kernels of the log-probability.

With z = (y - a·x - b·v)/s. Forward: each program reduces one block of one row to a partial sum of z² in its own slot;
the last program of a row adds them in fixed order. Gradient: one read of x, v, y, one write of it. One launch each.
Where s is None the log-probability is the negative squared error, without a factor or a constant.
"""

import triton
import triton.language as tl

from ..gaussian_step.kernel import finish_log_prob, load_deviation, load_scalar


@triton.jit
def standard_residual(x_ptr, v_ptr, y_ptr, a_less_one, b, inverse_s, mask):
    """(y - a·x - b·v)/s of one block in float32; zero beyond the row.

    Steps are short and a is near 1, which float32 knows to 6e-8 only, but a - 1 well.
    """
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr, mask=mask, other=0.0).to(tl.float32)
    return ((y - x) - a_less_one * x - b * v) * inverse_s


@triton.jit(do_not_specialize=["blocks"])
def _log_prob_fwd_kernel(
    log_prob_ptr,
    partials_ptr,
    arrivals_ptr,
    x_ptr,
    v_ptr,
    y_ptr,
    a_less_one,
    b,
    s,
    x_stride,
    v_stride,
    y_stride,
    elements,
    blocks,
    a_step,
    b_step,
    s_step,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    a_less_one, b = load_scalar(a_less_one, row, a_step), load_scalar(b, row, b_step)
    step, inverse_s = None, 1.0
    if s is not None:
        step = load_deviation(s, row, s_step)
        inverse_s = tl.div_rn(1.0, step)
    z = standard_residual(
        x_ptr + row * x_stride + start + offsets,
        v_ptr + row * v_stride + start + offsets,
        y_ptr + row * y_stride + start + offsets,
        a_less_one,
        b,
        inverse_s,
        offsets < elements - start,
    )
    tl.store(partials_ptr + pid, tl.sum(z * z))
    finish_log_prob(log_prob_ptr, partials_ptr, arrivals_ptr, row, step, elements, blocks)


@triton.jit(do_not_specialize=["blocks"])
def _log_prob_bwd_kernel(
    grad_v_ptr,
    grad_ptr,
    x_ptr,
    v_ptr,
    y_ptr,
    a_less_one,
    b,
    s,
    x_stride,
    v_stride,
    y_stride,
    elements,
    blocks,
    a_step,
    b_step,
    s_step,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - start
    a_less_one, b = load_scalar(a_less_one, row, a_step), load_scalar(b, row, b_step)
    inverse_s, scale = 1.0, 2.0
    if s is not None:
        inverse_s, scale = tl.div_rn(1.0, load_deviation(s, row, s_step)), 1.0
    factor = tl.load(grad_ptr + row) * tl.div_rn(scale * b * inverse_s, tl.cast(elements, tl.float32))
    z = standard_residual(
        x_ptr + row * x_stride + start + offsets,
        v_ptr + row * v_stride + start + offsets,
        y_ptr + row * y_stride + start + offsets,
        a_less_one,
        b,
        inverse_s,
        mask,
    )
    out = grad_v_ptr + row * elements + start + offsets
    tl.store(out, (factor * z).to(grad_v_ptr.dtype.element_ty), mask=mask)
