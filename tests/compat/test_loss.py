"""GRPOLoss against the objective written out over float64 log-densities."""

from typing import Any

import pytest
import torch

from fastgrpo_kernels import STREAM_SDE, StoredStep, noise_key, normal, transitions
from fastgrpo_kernels.compat import GRPOLoss

_, B, S = map(torch.as_tensor, transitions.dance_sde(torch.tensor([0.9, 0.6, 0.4]), torch.tensor([0.8, 0.5, 0.3]), 0.3))
ADVANTAGES = torch.tensor([1.5, -0.7, -9.0])


def inputs(shift=0.02):
    generator = torch.Generator().manual_seed(0)
    v, delta, ref = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    key = noise_key(5, [0, 1, 2], 3, 0, STREAM_SDE, "cpu")
    return v.requires_grad_(), (v + shift * delta).detach(), v.detach() + 0.05 * ref, key


def written_out(v, v_old, ref, eps, low, high, beta):
    v = v.detach().double().requires_grad_()
    b, s = (c.view(-1, 1, 1, 1) for c in (B, S))

    def log_density(mean):
        # y = mean_old + s·ε, so that only differences of means count.
        z = eps.double() + b * (v_old.double() - mean) / s
        return (-(z**2) / 2).flatten(1).mean(1)

    ratio = (log_density(v) - log_density(v_old.double())).exp()
    advantages = ADVANTAGES.double().clamp(-5, 5)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    kl = ((b * (v - ref.double()) / s) ** 2).flatten(1).mean(1) / 2
    loss = (loss + beta * kl).mean()
    return loss, torch.autograd.grad(loss, v)[0], ratio, kl


@pytest.mark.parametrize("low, high, beta", [(1e-4, 1e-4, 0.0), (0.2, 0.3, 0.0), (0.2, 0.3, 0.04)])
@pytest.mark.parametrize("form", ["key", "noise", "step"])
def test_loss_and_gradient(low, high, beta, form):
    v, v_old, ref, key = inputs()
    eps = normal(key, v.shape[1:])
    x = torch.zeros_like(eps)
    y = (B.view(-1, 1, 1, 1) * v_old.double() + S.view(-1, 1, 1, 1) * eps.double()).float()
    noise = {"key": key, "noise": eps, "step": StoredStep(x, y, 1.0)}[form]
    loss, metrics = GRPOLoss(epsilon_low=low, epsilon_high=high, beta=beta)(
        v, v_old, B, S, noise, ADVANTAGES, ref if beta else None
    )
    (grad,) = torch.autograd.grad(loss, v)
    expected, expected_grad, ratio, kl = written_out(v, v_old, ref, eps, low, high, beta)
    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-6 * abs(float(expected.detach()))
    # ε recovered from latents stored in float32 is known to about 1e-6.
    tolerance = 1e-5 if form == "step" else 1e-6
    assert (grad - expected_grad).abs().max() <= tolerance * expected_grad.abs().max()
    assert abs(float(metrics["ratio"]) - float(ratio.detach().mean())) <= 1e-6
    if beta:
        assert abs(float(metrics["kl"]) - float(kl.detach().mean())) <= 1e-6 * float(kl.detach().mean())


def test_on_policy_the_ratio_is_exactly_one():
    v, _, _, key = inputs()
    loss, metrics = GRPOLoss()(v, v.detach().clone(), B, S, key, ADVANTAGES)
    assert float(metrics["max_deviation"]) == 0
    assert float(loss.detach()) == pytest.approx(-float(ADVANTAGES.clamp(-5, 5).mean()), rel=1e-6)
    assert torch.autograd.grad(loss, v)[0].any()


def test_floats_are_coefficients_too():
    v, v_old, _, key = inputs()
    one = GRPOLoss(epsilon_low=0.2, epsilon_high=0.2)(v, v_old, -0.1, 0.09, key, ADVANTAGES)[0]
    rows = torch.full((3,), 1.0, dtype=torch.float64)
    each = GRPOLoss(epsilon_low=0.2, epsilon_high=0.2)(v, v_old, -0.1 * rows, 0.09 * rows, key, ADVANTAGES)[0]
    assert float(one.detach()) == pytest.approx(float(each.detach()), rel=1e-6)


@pytest.mark.parametrize(
    "settings, ref, advantages, message",
    [
        ({"beta": 0.1}, False, ADVANTAGES, r"ref_model_output: beta = 0.1 needs"),
        ({}, True, ADVANTAGES, r"ref_model_output: kl_weight = 0.0 ignores it"),
        ({}, False, ADVANTAGES[:2], r"^advantages: expected shape .*\[3\].*, got \[2\]"),
    ],
)
def test_bad_calls(settings, ref, advantages, message):
    v, v_old, reference, key = inputs()
    with pytest.raises(ValueError, match=message):
        GRPOLoss(**settings)(v, v_old, B, S, key, advantages, reference if ref else None)


def test_a_wrong_tensor_is_named_as_the_module_names_it():
    v, v_old, reference, key = inputs()
    for call, error, message in (
        (lambda: GRPOLoss()(None, v_old, B, S, key, ADVANTAGES), TypeError, "^model_output: expected a tensor"),
        (lambda: GRPOLoss()(v, v_old[:1], B, S, key, ADVANTAGES), ValueError, "^old_model_output: expected shape"),
        (lambda: GRPOLoss()(v, v, B, S, key, ADVANTAGES), ValueError, "^old_model_output: requires a gradient"),
        (lambda: GRPOLoss()(v, v_old, B, -S, key, ADVANTAGES), ValueError, "^s: must be positive"),
        (
            lambda: GRPOLoss()(v, v_old, B, S, key, ADVANTAGES, mask=torch.ones(3, 2, dtype=torch.bool)),
            ValueError,
            "^mask: expected the latents' shape",
        ),
        (lambda: GRPOLoss()(v, v_old, B, S, key, [1.0] * 3), TypeError, "^advantages: expected a"),
        (
            lambda: GRPOLoss(beta=0.1)(v, v_old, B, S, key, ADVANTAGES, reference.double()),
            TypeError,
            "^ref_model_output: expected float32, bfloat16 or float16",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"epsilon_low": -1.0}, ValueError, "^epsilon_low: must be at least 0, got -1.0"),
        ({"clip_range": -1.0}, ValueError, "^clip_range: must be at least 0"),
        ({"clip_high": "wide"}, TypeError, "^clip_high: expected a number, got str"),
        ({"delta": 0.5}, ValueError, "^delta: must be greater than 1"),
        ({"dual_clip": 0.5}, ValueError, "^dual_clip: must be greater than 1"),
        ({"beta": -1.0}, ValueError, "^beta: must be at least 0"),
        ({"adv_clip_max": 0.0}, ValueError, "^adv_clip_max: must be positive, or None"),
        ({"ratio": "other"}, ValueError, "^ratio: unknown form 'other'"),
        ({"reduction": "sum"}, ValueError, "^reduction: expected 'mean' over samples or 'none', got 'sum'"),
        ({"epsilon_lo": 0.1}, TypeError, "^GRPOLoss: unknown setting 'epsilon_lo'; did you mean 'epsilon_low'"),
        ({"temperature": 0.1}, TypeError, "^GRPOLoss: unknown setting 'temperature'; one of: clip_low"),
        ({"beta": 0.1, "kl_weight": 0.2}, TypeError, "^beta: sets kl_weight, which 'kl_weight' sets too"),
        ({"epsilon": 0.1, "clip_range": 0.2}, TypeError, "^clip_range: sets clip_low, which 'epsilon' sets too"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named_as_they_were_given(settings, error, message):
    with pytest.raises(error, match=message):
        GRPOLoss(**settings)


def test_other_trainers_names_set_the_same_settings():
    ours = GRPOLoss(clip_low=0.1, clip_high=0.2, kl_weight=0.3, dual_clip=2.0, advantage_clip=4.0)
    theirs = GRPOLoss(epsilon_low=0.1, epsilon_high=0.2, beta=0.3, delta=2.0, adv_clip_max=4.0)
    assert ours.settings == theirs.settings
    assert GRPOLoss(clip_range=0.1).settings == GRPOLoss(epsilon=0.1).settings
    assert GRPOLoss(epsilon=0.1).settings == GRPOLoss(clip_low=0.1, clip_high=0.1).settings
    for both in (GRPOLoss(epsilon=0.1, epsilon_high=0.2), GRPOLoss(epsilon_high=0.2, epsilon=0.1)):
        assert both.settings == GRPOLoss(clip_low=0.1, clip_high=0.2).settings


def test_it_is_a_module_that_shows_its_settings():
    module = GRPOLoss(beta=0.04)
    assert list(module.parameters()) == []
    assert repr(module) == (
        "GRPOLoss(clip_low=0.0001, clip_high=0.0001, kl_weight=0.04, dual_clip=None, dppo_threshold=None, "
        "advantage_clip=5.0, ratio='gaussian', reduction='mean')"
    )


def test_advantages_may_stay_unclipped():
    v, v_old, _, key = inputs()
    loss, _ = GRPOLoss(advantage_clip=None)(v, v_old, B, S, key, ADVANTAGES)
    clipped, _ = GRPOLoss()(v, v_old, B, S, key, ADVANTAGES)
    # The third advantage is -9, and the ratios are 1 to 1e-3.
    assert float((loss - clipped).detach()) == pytest.approx(4.0 / 3, rel=1e-2)


def test_the_loss_of_each_sample():
    v, v_old, ref, key = inputs()
    settings: dict[str, Any] = {"clip_range": 0.2, "beta": 0.04}
    losses, metrics = GRPOLoss(**settings, reduction="none")(v, v_old, B, S, key, ADVANTAGES, ref)
    mean, expected = GRPOLoss(**settings)(v, v_old, B, S, key, ADVANTAGES, ref)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.mean(), mean, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    weights = torch.tensor([0.5, 0.0, 2.0])
    (grad,) = torch.autograd.grad((weights * losses).sum(), v)
    (unweighted,) = torch.autograd.grad(mean, v)
    torch.testing.assert_close(grad, unweighted * (3 * weights).view(3, 1, 1, 1), rtol=1e-5, atol=1e-9)


def test_padded_elements_do_not_count():
    v, v_old, _, key = inputs()
    eps = normal(key, v.shape[1:])
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[..., :5] = True
    loss, metrics = GRPOLoss(clip_range=0.2)(v, v_old, B, S, eps, ADVANTAGES, mask=mask)
    (grad,) = torch.autograd.grad(loss, v)
    short = v.detach()[..., :5].contiguous().requires_grad_()
    expected, _ = GRPOLoss(clip_range=0.2)(short, v_old[..., :5], B, S, eps[..., :5], ADVANTAGES)
    (expected_grad,) = torch.autograd.grad(expected, short)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[..., :5], expected_grad, rtol=1e-5, atol=1e-9)
    assert not grad[..., 5:].any()
    assert metrics["max_deviation"] > 0
