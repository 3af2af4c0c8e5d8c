"""The objective against its formulas in float64 numpy, and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from support.objective import SUMMED, log_ratio, policy_loss

from fastgrpo.config import ObjectiveConfig


def moments(count: int = 64, seed: int = 0):
    rng = np.random.default_rng(seed)
    P, Q = rng.normal(0, 2e-3, count), rng.uniform(0, 1e-3, count)
    s, A = rng.uniform(0.1, 0.6, count), rng.normal(0, 1, count)
    weight = (rng.random(count) > 0.2).astype(float)
    return [torch.tensor(x, dtype=torch.float64) for x in (P, Q, s, A, weight)]


def oracle(P, Q, s, A, weight, config, Q_reference=None):
    total = 0.0
    for i in range(len(P)):
        gaussian = P[i] - Q[i] / 2
        exponent = {"gaussian": gaussian, "unit": 2 * s[i] ** 2 * gaussian, "ratio_norm": s[i] * P[i]}[config.ratio]
        ratio = np.exp(exponent)
        loss = max(-A[i] * ratio, -A[i] * min(max(ratio, 1 - config.clip_low), 1 + config.clip_high))
        if config.dual_clip is not None and A[i] < 0:
            loss = min(loss, -A[i] * config.dual_clip)
        outwards = (ratio > 1 and A[i] > 0) or (ratio < 1 and A[i] < 0)
        if config.dppo_threshold is not None and Q[i] / 2 >= config.dppo_threshold and outwards:
            loss = 0.0
        if Q_reference is not None:
            loss += config.kl_weight * Q_reference[i] / 2
        total += weight[i] * loss
    return total


CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig(clip_low=1e-3, clip_high=5e-3),
    ObjectiveConfig(ratio="unit", clip_low=1e-5, clip_high=1e-5),
    ObjectiveConfig(ratio="ratio_norm"),
    ObjectiveConfig(dual_clip=1.0005, clip_low=0.1, clip_high=0.1),
    ObjectiveConfig(dppo_threshold=2e-4, clip_low=0.5, clip_high=0.5),
    ObjectiveConfig(kl_weight=0.3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.ratio + str(c.dual_clip) + str(c.dppo_threshold))
def test_loss_is_the_formula(config):
    P, Q, s, A, weight = moments()
    reference = torch.linspace(0, 1e-3, len(P), dtype=torch.float64) if config.kl_weight else None
    loss, _ = policy_loss(P, Q, s, A, weight, config, reference)
    other = None if reference is None else reference.numpy()
    expected = oracle(*(x.numpy() for x in (P, Q, s, A, weight)), config=config, Q_reference=other)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.ratio + str(c.dual_clip) + str(c.dppo_threshold))
def test_gradient_is_that_of_the_formula(config):
    P, Q, s, A, weight = moments(24, seed=3)
    reference = torch.linspace(0, 1e-3, len(P), dtype=torch.float64) if config.kl_weight else None
    inputs = [P.requires_grad_(), Q.requires_grad_()]

    def value(p, q):
        return policy_loss(p, q, s, A, weight, config, reference)[0]

    assert torch.autograd.gradcheck(value, inputs, eps=1e-8, atol=1e-6)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_advantage():
    _, _, s, A, weight = moments()
    P, Q = torch.zeros_like(s).requires_grad_(), torch.zeros_like(s).requires_grad_()
    loss, statistics = policy_loss(P, Q, s, A, weight, ObjectiveConfig())
    loss.backward()
    assert statistics.max_deviation.item() == 0
    for leaf, expected in ((P, -A * weight), (Q, A * weight / 2)):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


def test_statistics_are_weighted_sums():
    P, Q, s, A, weight = moments(200, seed=1)
    config = ObjectiveConfig(clip_low=1e-3, clip_high=1e-3)
    _, statistics = policy_loss(P, Q, s, A, weight, config)
    ratio = np.exp((P - Q / 2).numpy())
    w, sums = weight.numpy(), dict(zip(SUMMED, statistics.sums.tolist(), strict=True))
    low, high = ratio < 1 - 1e-3, ratio > 1 + 1e-3
    clipped = (high & (A.numpy() > 0)) | (low & (A.numpy() < 0))
    assert sums["weight"] == w.sum()
    assert sums["clipped"] == (clipped * w).sum() > 0
    assert sums["ratio"] == pytest.approx((ratio * w).sum())
    assert sums["kl"] == pytest.approx((Q.numpy() / 2 * w).sum())
    assert statistics.max_deviation.item() == pytest.approx(np.abs(ratio - 1)[w > 0].max())


def test_padding_of_weight_zero_changes_nothing():
    P, Q, s, A, weight = moments(32)
    loss, statistics = policy_loss(P, Q, s, A, weight, ObjectiveConfig())
    extra = [torch.cat([x, torch.full((5,), 3.0, dtype=torch.float64)]) for x in (P, Q, s, A)]
    longer = torch.cat([weight, torch.zeros(5, dtype=torch.float64)])
    padded, same = policy_loss(*extra, weight=longer, config=ObjectiveConfig())
    assert padded.item() == pytest.approx(loss.item(), rel=1e-14)
    assert torch.allclose(statistics.sums, same.sums, rtol=1e-14)
    assert statistics.max_deviation == same.max_deviation


def test_gaussian_log_ratio_is_the_difference_of_log_densities():
    generator = torch.Generator().manual_seed(0)
    v, v_old, x, eps = (torch.randn(3, 50, dtype=torch.float64, generator=generator) for _ in range(4))
    v_old = v + 0.01 * v_old
    a, b, s = 0.9, -0.2, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    y = a * x + b * v_old + s[:, None] * eps
    new, old = (torch.distributions.Normal(a * x + b * w, s[:, None]).log_prob(y).mean(1) for w in (v, v_old))
    d = b * (v - v_old) / s[:, None]
    P, Q = (d * eps).mean(1), (d * d).mean(1)
    assert torch.allclose(log_ratio(P, Q, s, "gaussian"), new - old, rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.ratio + str(c.dual_clip) + str(c.dppo_threshold))
def test_a_loss_for_each_reward_is_the_sum_of_their_losses(config):
    P, Q, s, A, weight = moments()
    other = torch.linspace(-2, 2, len(P), dtype=torch.float64)
    both, statistics = policy_loss(P, Q, s, torch.stack([A, other], dim=1), weight, config)
    each = [policy_loss(P, Q, s, a, weight, config) for a in (A, other)]
    assert both.item() == pytest.approx(sum(loss.item() for loss, _ in each), rel=1e-12)
    assert statistics.sums[1].item() == pytest.approx(sum(s.sums[1].item() for _, s in each) / 2)


def test_a_loss_for_each_reward_differs_from_the_loss_of_their_sum():
    r = torch.tensor([3e-4], dtype=torch.float64).log1p().requires_grad_()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    config = ObjectiveConfig(clip_low=1e-4, clip_high=1e-4)
    gradients = []
    for advantage in (torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[1.0]]).double()):
        loss, _ = policy_loss(r, zero, one, advantage, one, config)
        gradients.append(torch.autograd.grad(loss, r)[0].item())
    # +2 is clipped, −1 is not; their sum, +1, is clipped.
    assert gradients == [pytest.approx(1 + 3e-4), 0.0]
