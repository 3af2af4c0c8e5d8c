"""Every operation over latents at one element, odd sizes and a hundred thousand rows, on the CPU path."""

import pytest
import torch
from support.kernel_cases import make_case

from fastgrpo_kernels import gaussian_step, grpo_loss, log_prob, on_policy_gradient, shift_moments
from fastgrpo_kernels.gaussian_step.reference import gaussian_step_reference
from fastgrpo_kernels.log_prob.reference import log_prob_reference
from fastgrpo_kernels.shift_moments.reference import shift_moments_reference


@pytest.mark.parametrize("batch, elements", [(2, 1), (3, 63), (2, 1000), (2, 4097), (100_000, 3)])
def test_every_operation_is_right(batch, elements):
    case = make_case((batch, 1, elements), torch.float32)
    a, b, s, eps = case.a, case.b, case.s, case.eps
    y = gaussian_step(case.x, case.v_old, a, b, s, case.key)
    expected = gaussian_step_reference(case.x, case.v_old, a, b, s, eps)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6)
    value = log_prob(case.x, case.v_old, y, a, b, s)
    expected = log_prob_reference(case.x, case.v_old, y, a, b, s)
    # Of single elements whose residual is a tenth of its terms or less.
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    P, Q = shift_moments(case.v, case.v_old, b, s, case.key)
    p, q = shift_moments_reference(case.v, case.v_old, b, s, eps)
    torch.testing.assert_close(Q.double(), q, rtol=1e-6, atol=0)
    assert ((P.double() - p).abs() <= 1e-6 * (q * eps.double().flatten(1).square().mean(1)).sqrt()).all()
    v = case.v_old.clone().requires_grad_()
    advantage = torch.where(torch.arange(batch) % 2 == 0, 1.0, -1.0)
    grpo_loss(v, case.v_old, b, s, case.key, advantage, 1.0, clip_low=1e-4, clip_high=1e-4)[0].backward()
    gradient = on_policy_gradient(advantage, b, s, case.key, v.shape)
    torch.testing.assert_close(v.grad, gradient, rtol=1e-5, atol=0)
