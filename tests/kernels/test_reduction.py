"""Rows shared by several programs: sums in fixed order, counters back at zero, whichever program arrives last."""

import pytest
import torch
import triton
import triton.language as tl
from support.kernel_cases import KERNEL_DEVICE, make_case, on_device

from fastgrpo_kernels import _launch, reduction
from fastgrpo_kernels.shift_moments import op
from fastgrpo_kernels.shift_moments.inputs import Shift


@triton.jit
def _sum_kernel(out_ptr, values_ptr, partials_ptr, arrivals_ptr, blocks):
    pid = tl.program_id(0)
    row = pid // blocks
    tl.store(partials_ptr + pid, tl.load(values_ptr + pid))
    if reduction.is_last_of_row(arrivals_ptr, row, blocks):
        tl.store(out_ptr + row, reduction.sum_slots(partials_ptr, row, blocks))


@pytest.mark.parametrize("blocks", [1, 3, 257])
def test_the_last_program_of_a_row_adds_its_slots(blocks):
    values = torch.randn(2, blocks, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    counters = torch.zeros(5, dtype=torch.int32, device=KERNEL_DEVICE)
    sums, out = [], torch.empty(0)
    for _ in range(2):
        # What is not written shows.
        out, partials = torch.full((2,), float("nan")).to(values), torch.full_like(values, float("nan"))
        _launch.launch(_sum_kernel, 2 * blocks, out.device, out, values, partials, counters, blocks, num_warps=4)
        assert torch.count_nonzero(counters) == 0
        sums.append(out)
    assert torch.equal(*sums)
    torch.testing.assert_close(out.double(), values.double().sum(1), rtol=1e-5, atol=1e-5)


def test_counters_of_an_earlier_call_serve_the_next(monkeypatch):
    """More rows, fewer, and other blocks a row, on counters that are kept as they are on a device."""
    counters = torch.zeros(64, dtype=torch.int32, device=KERNEL_DEVICE)
    monkeypatch.setattr(op, "arrivals", lambda count, device, kept: counters)
    for batch, elements in ((3, 5000), (2, 1), (3, 5000)):
        case = make_case((batch, elements), torch.float32)
        shift = on_device(Shift(case.v, case.v_old, case.b, case.s, case.eps))
        found = op.launch_shift_moments(shift)
        wanted = op.moments_cpu(Shift(*case[1:3], case.b, case.s, case.eps), mean_of_masked=True)
        for moment, expected in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(moment.cpu(), expected, rtol=1e-5, atol=1e-7)
        assert torch.count_nonzero(counters) == 0
