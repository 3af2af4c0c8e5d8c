"""The losses of DiffusionNFT and AWM against those projects' formulas, written out in their order."""

from typing import Any, cast

import pytest
import torch
from support.launches import aten, counting, triton

from fastgrpo_kernels import STREAM_SDE, noise_key, normal
from fastgrpo_kernels.compat import awm, diffusion_nft

# Of the largest gradient, and of the value.
TOLERANCE = 1e-5
TIME = torch.tensor([0.97, 0.6, 0.31, 0.02])
ADVANTAGES = torch.tensor([0.8, -1.7, 9.0, -6.0])


def inputs(shape=(4, 16, 8, 8), dtype=torch.float32, shift=0.05):
    generator = torch.Generator().manual_seed(0)
    v, delta, x0 = (torch.randn(shape, generator=generator) for _ in range(3))
    key = noise_key(5, list(range(shape[0])), 3, 0, STREAM_SDE, "cpu")
    old = (v + shift * delta).to(dtype)
    return v.to(dtype).requires_grad_(), old, x0, key


def nft_written_out(v, old, x0, noise, t, advantages, beta, clip):
    """In the order of its training loop, on what is given."""
    time = t.view(-1, 1, 1, 1)
    xt = (1 - time) * x0 + time * noise
    r = (advantages.clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)
    losses = []
    for branch in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
        distance = xt - time * branch - x0
        weight = distance.detach().double().abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
        losses.append((distance**2 / weight).mean((1, 2, 3)))
    return ((r * losses[0] / beta + (1 - r) * losses[1] / beta) * clip).mean()


def awm_written_out(v, old, x0, noise, t, advantages, weighting, clip):
    """Log-probabilities in float64, as its function has them."""

    def log_prob(output):
        value = -((output.double() - (noise.double() - x0.double())) ** 2).mean((1, 2, 3))
        if weighting == "huber":
            return -((1e-10 - value).sqrt() - 1e-5) * t
        return value * {"Uniform": 1.0, "t": t, "t**2": t**2}[weighting]

    ratio = (log_prob(v) - log_prob(old)).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def assert_equal(loss, expected, v):
    (grad,), (wanted,) = torch.autograd.grad(loss, v), torch.autograd.grad(expected, v)
    assert abs(float(loss.detach()) - float(expected.detach())) <= TOLERANCE * abs(float(expected.detach()))
    # A gradient in bfloat16 is rounded once, on either side.
    relative = 0 if v.dtype == torch.float32 else 2.0**-7
    excess = (grad - wanted).double().abs() - relative * wanted.double().abs()
    assert excess.max() <= TOLERANCE * wanted.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["key", "noise"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_diffusion_nft(beta, form, dtype):
    v, old, x0, key = inputs(dtype=dtype)
    noise = normal(key, v.shape[1:])
    drawn = key if form == "key" else noise
    loss = diffusion_nft.policy_loss(v, old, x0, drawn, TIME, ADVANTAGES, beta=beta, adv_clip_max=5.0)
    # In float64, then in the loop's own float32 arithmetic.
    assert_equal(loss, nft_written_out(v.double(), old.double(), x0, noise, TIME, ADVANTAGES, beta, 5.0), v)
    loss = diffusion_nft.policy_loss(v, old, x0, drawn, TIME, ADVANTAGES, beta=beta, adv_clip_max=5.0)
    if dtype == torch.float32:
        assert_equal(loss, nft_written_out(v, old, x0, noise, TIME, ADVANTAGES, beta, 5.0), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["key", "noise"])
@pytest.mark.parametrize("weighting", ["Uniform", "t", "t**2", "huber"])
def test_awm(weighting, form, dtype):
    v, old, x0, key = inputs(dtype=dtype)
    noise = normal(key, v.shape[1:])
    drawn, settings = key if form == "key" else noise, {"weighting": weighting, "clip_range": 1e-3}
    time = TIME.view(-1, 1, 1, 1)
    loss = awm.policy_loss(v, old, x0, drawn, time, ADVANTAGES, **settings)
    assert_equal(loss, awm_written_out(v, old, x0, noise, TIME, ADVANTAGES, weighting, 1e-3), v)


@pytest.mark.parametrize("name", ["nft", "Uniform", "t", "t**2", "huber"])
def test_launches(name):
    """One kernel each way; beside them the gradient that autograd starts from, and t²."""
    v, old, x0, noise = (torch.empty(4, 16, 8, 8, device="meta") for _ in range(4))
    t, advantages = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    v.requires_grad_()
    with counting() as counted:
        if name == "nft":
            loss = diffusion_nft.policy_loss(v, old, x0, noise, t, advantages, beta=1.0, adv_clip_max=5.0)
        else:
            loss = awm.policy_loss(v, old, x0, noise, t, advantages, weighting=name, clip_range=1e-4)
        loss.backward()
    assert triton(counted) == 2
    assert aten(counted) == 1 + (name == "t**2")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"old": torch.ones(1)}, r"old_prediction: expected shape \[4, 16, 8, 8\]"),
        ({"x0": torch.ones(1)}, r"^x0: expected shape"),
        ({"noise": None}, r"^noise: expected"),
        ({"t": torch.zeros(4)}, r"^t: must be positive"),
        ({"t": torch.ones(3)}, r"^t: expected \[4\], one a sample, got shape \[3\]"),
        ({"advantages": torch.ones(3)}, r"^advantages: expected"),
        ({"clip": 0.0}, r"^adv_clip_max: must be greater than 0, got 0\.0"),
    ],
)
def test_errors_have_the_names_that_were_given(change, message):
    v, old, x0, key = inputs()
    given = {"old": old, "x0": x0, "noise": key, "t": TIME, "advantages": ADVANTAGES, "clip": 5.0} | change
    clip = given.pop("clip")
    with pytest.raises((TypeError, ValueError), match=message):
        diffusion_nft.policy_loss(v, *given.values(), beta=1.0, adv_clip_max=clip)


def test_awm_names_what_is_wrong():
    v, old, x0, key = inputs()
    with pytest.raises(ValueError, match="weighting: unknown 'huge'; one of: Uniform, t"):
        cast(Any, awm.policy_loss)(v, old, x0, key, TIME, ADVANTAGES, weighting="huge", clip_range=1e-4)
    with pytest.raises(ValueError, match="clip_range: must be at least 0"):
        awm.policy_loss(v, old, x0, key, TIME, ADVANTAGES, weighting="t", clip_range=-1.0)
