"""Bits of the kernels: run to run, and of a row alone or in a batch of 64."""

import pytest
import torch
from support.kernel_cases import KERNEL_DEVICE, make_case

from fastgrpo_kernels.clipped_loss import fused
from fastgrpo_kernels.clipped_loss import op as clipped
from fastgrpo_kernels.gaussian_step import paths
from fastgrpo_kernels.log_prob import op as density
from fastgrpo_kernels.noise import launch_normal
from fastgrpo_kernels.on_policy_gradient import op as on_policy
from fastgrpo_kernels.shift_moments import op as moments
from fastgrpo_kernels.shift_moments.inputs import Shift

# More than one block, for the order of sums; less than one.
BATCH, LONG, SHORT = 64, 2100, 63
LOSS = clipped.Objective("ratio_norm", 1e-3, 2e-3, 1.5, 1e-3, 0.1, 1.0)


def rows_of(rows, elements, dtype=torch.bfloat16):
    """Tensors of some of 64 samples, each of its own values and coefficients."""
    case = make_case((BATCH, elements), dtype)
    x, v, v_old, a, b, s, words, eps = (
        t[rows].to(KERNEL_DEVICE) for t in (*case[:3], *(c.float() for c in case[3:6]), case.key.words, case.eps)
    )
    return x, v, v_old, a, b, s, words, eps


def normal(rows):
    *_, words, _ = rows_of(rows, SHORT)
    return [launch_normal(words, 3, SHORT)]


def gaussian_step(rows):
    x, v, v_old, a, b, s, _, eps = rows_of(rows, LONG)
    step = paths.Step(x, v, a, b, s, eps, None, 0, torch.float32, v_old, s, a, b, log_prob=True, keep_v=True)
    return paths.launch_gaussian_step(step)


def every_moment(rows):
    x, v, v_old, a, b, s, *_ = rows_of(rows, LONG)
    selected = x > -1
    return moments.launch_shift_moments(
        Shift(v, v_old, b, s, x=x, y=v_old.float(), a_less_one=a - 1, v_uncond=x.to(v.dtype), guidance=a, mask=selected)
    )[:3]


def moments_of_a_key(rows):
    _, v, v_old, _, b, s, words, _ = rows_of(rows, SHORT)
    return moments.launch_shift_moments(Shift(v, v_old, b, s, words=words, seed=3))[:2]


def gradient_of_the_moments(rows):
    _, v, v_old, a, b, s, words, _ = rows_of(rows, SHORT)
    return moments.launch_shift_moments_backward(a, s, Shift(v, v_old, b, s, words=words, seed=3))[:1]


def log_prob(rows):
    x, v, v_old, a, b, s, *_ = rows_of(rows, LONG)
    return [density.launch_log_prob(x, v, v_old, a - 1, b, s)]


def gradient_of_the_log_prob(rows):
    x, v, v_old, a, b, s, *_ = rows_of(rows, SHORT)
    return [density.launch_log_prob_backward(s, x, v, v_old, a - 1, b, s)]


def on_policy_gradient(rows):
    _, v, _, a, b, s, words, _ = rows_of(rows, SHORT)
    return [on_policy.launch_on_policy_gradient(a, b, s, None, words, 3, v.shape, v.dtype)]


def factors_of_the_loss(rows):
    x, v, _, a, _, s, *_ = rows_of(rows, SHORT, torch.float32)
    P, Q, Q_reference, advantage = 1e-2 * x[:, 0], 1e-3 * v[:, 0].square(), v[:, 1].square(), x[:, 1].contiguous()
    return clipped.launch_clipped_loss(P, Q, s, advantage, a, Q_reference, LOSS)[2].unbind(0)


def losses_of_all(rows):
    """The samples' losses and gradient factors from latents, a reference model and a mask among them."""
    x, v, v_old, a, b, s, *_ = rows_of(rows, LONG)
    selected = x > -1
    shift = Shift(v, v_old, b, s, x=x, y=v_old.float(), a_less_one=a - 1, v_reference=v_old.flip(1), mask=selected)
    advantages = x[:, :2].contiguous()
    loss, _, factors = fused.launch_grpo_loss(advantages, a, LOSS, True, shift)
    return [loss, *factors.unbind(0)]


KERNELS = (
    normal, gaussian_step, every_moment, moments_of_a_key, gradient_of_the_moments, log_prob, gradient_of_the_log_prob,
    on_policy_gradient, factors_of_the_loss, losses_of_all,
)  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_row_has_its_bits_alone_and_in_a_batch_of_64(kernel):
    whole = kernel(slice(None))
    # Another run each time.
    for row in (0, 37, 63):
        for found, expected in zip(kernel(slice(row, row + 1)), whole, strict=True):
            assert len(expected) == BATCH
            assert found.isfinite().all()
            assert torch.equal(found, expected[row : row + 1])
    assert not torch.equal(whole[0][0], whole[0][37])
