"""Coefficients that a call cannot read: NaN from the kernels, ValueError from compiled code; and layouts of models."""

from typing import Any

import pytest
import torch
from support.kernel_cases import KERNEL_DEVICE, gradient_of, make_case, on_device

from fastgrpo_kernels import (
    StoredStep,
    clipped_loss,
    gaussian_step,
    grpo_loss,
    log_prob,
    on_policy_gradient,
    shift_moments,
    transitions,
)
from fastgrpo_kernels.clipped_loss import op as clipped
from fastgrpo_kernels.gaussian_step import paths
from fastgrpo_kernels.log_prob import op as density
from fastgrpo_kernels.log_prob.reference import log_prob_reference
from fastgrpo_kernels.on_policy_gradient import op as on_policy
from fastgrpo_kernels.shift_moments import op as moments
from fastgrpo_kernels.shift_moments.inputs import Shift
from fastgrpo_kernels.shift_moments.reference import shift_moments_reference

CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 1e-3}


def test_a_deviation_that_is_none_gives_nan_in_its_row_alone():
    case = make_case((3, 4, 9), torch.float32)
    x, v, v_old, eps = (t.to(KERNEL_DEVICE) for t in (case.x, case.v, case.v_old, case.eps))
    a, b, s = (c.float().to(KERNEL_DEVICE) for c in (case.a, case.b, case.s))
    s[1], s[2] = 0.0, -s[2]
    one = torch.ones(3, device=KERNEL_DEVICE)
    shift = Shift(v, v_old, b, s, eps)
    step = paths.Step(x, v, a, b, s, eps, None, 0, torch.float32, log_prob=True)
    ratio = clipped.Objective("ratio_norm", 1e-3, 1e-3, None, None, 0.0, 1.0)
    found = [
        *moments.launch_shift_moments(shift)[:2],
        moments.launch_shift_moments_backward(one, one, shift)[0],
        density.launch_log_prob(x, v, x, a - 1, b, s),
        density.launch_log_prob_backward(one, x, v, x, a - 1, b, s),
        on_policy.launch_on_policy_gradient(one, b, s, eps, None, 0, x.shape, torch.float32),
        paths.launch_gaussian_step(step)[1],
        clipped.launch_clipped_loss(one, one, s, one, one, None, ratio)[2][0],
    ]
    for result in found:
        assert [bool(row.isnan().all()) for row in result] == [False, True, True]
        assert result[0].isfinite().all()


def calls():
    case = make_case((3, 4, 9), torch.float32)
    x, v, v_old, b, key = case.x, case.v, case.v_old, case.b, case.key
    row = torch.tensor([1.0, -1.0, 0.5])
    return {
        "shift_moments": lambda s: shift_moments(v, v_old, b, s, key),
        "log_prob": lambda s: log_prob(x, v, x, 1.0, b, s),
        "grpo_loss": lambda s: grpo_loss(v, v_old, b, s, key, row, 1.0, **CLIP)[0],
        "clipped_loss": lambda s: clipped_loss(row, row, s, row, 1.0, **CLIP, ratio="ratio_norm")[0],
        "on_policy_gradient": lambda s: on_policy_gradient(row, b, s, key, v.shape),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_compiled_code_refuses_what_tracing_could_not_read(name):
    call = torch.compile(calls()[name], fullgraph=True)
    s = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    call(s)
    negative, nan = s * torch.tensor([1.0, -1.0, 1.0]), s * torch.nan
    if name in ("log_prob", "on_policy_gradient"):
        with pytest.raises(ValueError, match="s: must be positive"):
            call(negative)
        with pytest.raises(ValueError, match="s: must be finite"):
            call(nan)
        return
    # On a CPU these are compiled as formulas: as on a device, a density of a deviation that is none is NaN.
    for wrong in (negative, nan):
        assert all(result.isnan().any() for result in as_tuple(call(wrong)))
    assert not any(result.isnan().any() for result in as_tuple(call(s)))


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def test_transitions_compile():
    sigma = torch.tensor([0.9, 0.5], dtype=torch.float64)
    for function, rest in (
        (transitions.dance_sde, (0.3,)),
        (transitions.flow_sde, (0.7, 0.98)),
        (transitions.cps, (0.5,)),
    ):
        compiled = torch.compile(lambda s, f=function, r=rest: f(s, s - 0.1, *r), fullgraph=True)(sigma)
        for found, expected in zip(compiled, function(sigma, sigma - 0.1, *rest), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_refuses_a_gradient_to_the_preview():
    case = make_case((3, 4, 9), torch.float32)
    clean = 1.0, torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="clean: requires a gradient"):
        gaussian_step(case.x, case.v, case.a, case.b, case.s, case.key, return_all=True, clean=clean)


def unpatchified(t):
    return t.unflatten(2, (3, 2)).transpose(2, 3).contiguous().transpose(2, 3).flatten(2, 3)


LAYOUTS = {
    "channels last": ((2, 4, 6, 7), lambda t: t.to(memory_format=torch.channels_last)),
    "channels last, video": ((2, 4, 3, 5, 6), lambda t: t.to(memory_format=torch.channels_last_3d)),
    "part of wider tokens": ((2, 9, 12), lambda t: torch.cat([t, t], dim=2)[..., :12]),
    "part of more tokens": ((2, 9, 12), lambda t: torch.cat([t, t], dim=1)[:, :9]),
    "unpatchified": ((2, 4, 6, 8), unpatchified),
    "half of a batch": ((2, 4, 6, 7), lambda t: torch.cat([t, t]).chunk(2)[1]),
    "one sample for all": ((2, 4, 6, 7), lambda t: t[:1].expand(2, -1, -1, -1)),
}  # fmt: skip


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout_gives_the_numbers_of_the_contiguous_one(layout):
    shape, lay = LAYOUTS[layout]
    case = make_case(shape, torch.bfloat16)
    v, v_old, x = lay(case.v), lay(case.v_old), lay(case.x)
    dense = [t.contiguous() for t in (v, v_old, x)]

    def results(v, v_old, x):
        v = v.detach().requires_grad_()
        p, q = shift_moments(v, v_old, case.b, case.s, case.key)
        (p + q).sum().backward()
        y = gaussian_step(x, v_old, case.a, case.b, case.s, case.key)
        return p.detach(), q.detach(), v.grad, y, log_prob(x, v_old, y, case.a, case.b, case.s)

    for found, expected in zip(results(v, v_old, x), results(*dense), strict=True):
        assert torch.equal(found, expected)
    shift = on_device(Shift(v, v_old, case.b.float(), case.s.float(), case.eps))
    p, q, *_ = moments.launch_shift_moments(shift)
    expected = shift_moments_reference(dense[0], dense[1], case.b, case.s, case.eps)
    torch.testing.assert_close(p.cpu().double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q.cpu().double(), expected[1], rtol=1e-6, atol=0)


def test_gradients_in_bfloat16_are_within_one_ulp():
    case = make_case((3, 4, 10, 25), torch.bfloat16)
    v = case.v.clone().requires_grad_()
    p, q = shift_moments(v, case.v_old, case.b, case.s, case.key)
    (p - q / 2).sum().backward()
    reference = case.v.double().requires_grad_()
    p, q = shift_moments_reference(reference, case.v_old, case.b, case.s, case.eps)
    (p - q / 2).sum().backward()
    expected = gradient_of(reference)
    ulp = 2.0 ** (expected.abs().log2().floor() - 7)
    device = on_device(Shift(case.v, case.v_old, case.b.float(), case.s.float(), case.eps))
    one = torch.ones(3, device=KERNEL_DEVICE)
    kernel, _ = moments.launch_shift_moments_backward(one, -0.5 * one, device)
    for found in (gradient_of(v), kernel.cpu()):
        assert ((found.double() - expected).abs() <= ulp + 1e-6 * expected.abs().max()).all()


def test_short_steps_keep_their_digits():
    """a is near 1 where a step is short: rounded to float32 it would lose what the residual is made of."""
    a, b, s = transitions.dance_sde(1.0, 0.99, 0.1)
    case = make_case((2, 4, 32, 32), torch.float32)
    x, v_old, one = case.x, case.v_old, torch.ones(2)
    y = gaussian_step(x, v_old, a, b, s, case.eps)
    v, reference = case.v.clone().requires_grad_(), case.v.double().requires_grad_()
    log_prob(x, v, y, a, b, s).sum().backward()
    log_prob_reference(x, reference, y, a, b, s).sum().backward()
    grad, moved_x, moved_v, moved_y = (t.to(KERNEL_DEVICE) for t in (one, x, case.v, y))
    kernel = density.launch_log_prob_backward(grad, moved_x, moved_v, moved_y, a - 1, b, s)
    for found in (gradient_of(v), kernel.cpu()):
        assert (found - gradient_of(reference)).abs().max() <= 3e-7 * gradient_of(reference).abs().max()

    stored = case.v.double().requires_grad_()
    eps = (y.double() - a * x.double() - b * v_old.double()) / s
    shift_moments_reference(stored, v_old, b, s, eps)[0].sum().backward()
    v.grad = None
    shift_moments(v, v_old, b, s, StoredStep(x, y, a))[0].sum().backward()
    shift = Shift(moved_v, v_old.to(KERNEL_DEVICE), b, s, x=moved_x, y=moved_y, a_less_one=a - 1)
    kernel, _ = moments.launch_shift_moments_backward(grad, 0 * grad, shift)
    for found in (gradient_of(v), kernel.cpu()):
        assert (found - gradient_of(stored)).abs().max() <= 3e-7 * gradient_of(stored).abs().max()
