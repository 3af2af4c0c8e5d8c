"""Moments and losses against a MatchingTarget: the sums of forward-process objectives."""

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, ULP, assert_within, gradient_of, make_case, modules_with

from fastgrpo_kernels import MatchingTarget, NoiseKey, grpo_loss, nft_loss, shift_moments
from fastgrpo_kernels.clipped_loss.reference import awm_log_prob_reference, nft_loss_reference
from fastgrpo_kernels.shift_moments.reference import matching_residual_reference, shift_moments_reference

SHAPES = ((3, 1, 1), (3, 4, 10, 25), (2, 1, 17, 241))
BETA, CLIP = 0.7, 5.0
# Flow, epsilon and v-prediction.
SCALES = {
    "flow": (1.0, -1.0),
    "epsilon": (1.0, 0.0),
    "v": (torch.tensor([0.9, 0.5, 0.2]), torch.tensor([-0.4, -0.8, -1])),
}
TIME = torch.tensor([0.9, 0.5, 0.05])
ADVANTAGES = torch.tensor([0.8, -1.7, 9.0])
WEIGHT = torch.tensor([0.3, 0.4, 0.3])


def make(shape, dtype, scales=SCALES["flow"], noise="key"):
    """(v, v_old, MatchingTarget, e in float64 [B, D])."""
    case = make_case(shape, dtype)
    batch = shape[0]
    scales = [c[:batch] if isinstance(c, torch.Tensor) else c for c in scales]
    target = MatchingTarget(case.x, case.key if noise == "key" else case.eps, *scales)
    return case.v, case.v_old, target, matching_residual_reference(case.v_old, case.eps, case.x, *scales)


def guided(v, fields):
    if "v_uncond" not in fields:
        return v
    return fields["v_uncond"] + fields["guidance_scale"] * (v - fields["v_uncond"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["key", "eps"])
@pytest.mark.parametrize("scales", list(SCALES))
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_match_the_oracle(shape, scales, noise, dtype):
    v, v_old, target, e = make(shape, dtype, SCALES[scales], noise)
    leaf = v.double().requires_grad_()
    p, q = shift_moments_reference(leaf, v_old, 1.0, 1.0, e)
    (grad,) = torch.autograd.grad((p + 0.3 * q).sum(), leaf)
    v.requires_grad_()
    found = shift_moments(v, v_old, 1.0, 1.0, target, residuals=BETA)
    (found.P + 0.3 * found.Q).sum().backward()
    change = (v.detach().double() - v_old.double()).flatten(1)
    size = (e.square().mean(1) * q).sqrt()
    assert ((found.P.double() - p).abs() <= 4e-7 * size).all()
    assert_within(found.Q, q, relative=1e-6, of_largest=0)
    assert_within(found.R, e.square().mean(1), relative=1e-6, of_largest=0)
    assert_within(found.positive, (e + BETA * change).abs().mean(1), relative=1e-6, of_largest=0)
    assert_within(found.negative, (e - BETA * change).abs().mean(1), relative=1e-6, of_largest=0)
    assert not found.R.requires_grad
    relative = 0 if dtype == torch.float32 else ULP[dtype]
    floor = 6e-8 / float(grad.abs().max()) if dtype == torch.float16 else 0
    assert_within(gradient_of(v), grad, relative=relative, of_largest=1e-6 + floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_outputs_have_not_moved(dtype):
    v, _, target, _ = make(SHAPES[1], dtype)
    found = shift_moments(v, v.clone(), 1.0, 1.0, target, residuals=BETA)
    assert torch.count_nonzero(found.P) == torch.count_nonzero(found.Q) == 0
    assert torch.equal(found.positive, found.negative)
    clip: dict[str, Any] = {"clip_low": 1e-4, "clip_high": 1e-4}
    for _, statistics in (
        grpo_loss(v, v.clone(), TIME, TIME, target, ADVANTAGES, WEIGHT, **clip, ratio="matching"),
        grpo_loss(v, v.clone(), TIME, TIME, target, ADVANTAGES, WEIGHT, **clip, ratio="huber"),
        nft_loss(v, v.clone(), TIME, target, ADVANTAGES, WEIGHT, beta=BETA, advantage_clip=CLIP),
    ):
        assert statistics.max_deviation == statistics.kl == 0


def awm(v, v_old, target, t, weighting, clip):
    """Value and gradient of AWM's loss in float64."""
    leaf = v.detach().double().flatten(1).requires_grad_()
    t = t.double()
    new, old = (awm_log_prob_reference(o, target, t, weighting) for o in (leaf, v_old.double().flatten(1)))
    ratio = (new - old).exp()
    a = ADVANTAGES.double()
    loss = (WEIGHT * torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))).sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0].view_as(v), ratio.detach()


def target_of(v_old, e):
    return v_old.double().flatten(1) - e


@pytest.mark.parametrize("weighting", ["Uniform", "t", "t**2", "huber"])
@pytest.mark.parametrize("compiled", [False, True])
def test_awm_matches_the_oracle(weighting, compiled):
    v, v_old, target, e = make(SHAPES[1], torch.float32)
    clip = 0.02
    expected, grad, ratio = awm(v, v_old, target_of(v_old, e), TIME, weighting, clip)
    w = {"Uniform": 1.0, "t": TIME, "t**2": TIME * TIME, "huber": TIME}[weighting]
    form = "huber" if weighting == "huber" else "matching"

    def run(v):
        return grpo_loss(v, v_old, w, w, target, ADVANTAGES, WEIGHT, clip_low=clip, clip_high=clip, ratio=form)

    v.requires_grad_()
    loss, statistics = (torch.compile(run, fullgraph=True) if compiled else run)(v)
    loss.backward()
    assert_within(loss, expected, relative=1e-6, of_largest=0)
    assert_within(gradient_of(v), grad, relative=0, of_largest=1e-6)
    assert_within(statistics.ratio, (WEIGHT * ratio).sum(), relative=1e-6, of_largest=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_nft_matches_the_oracle(several, compiled):
    v, v_old, target, e = make(SHAPES[1], torch.float32)
    advantages = torch.stack([ADVANTAGES, ADVANTAGES.flip(0)], 1) if several else ADVANTAGES
    leaf = v.double().flatten(1).requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for a in advantages.double().view(3, -1).unbind(1):
        r = (a.clamp(-CLIP, CLIP) / CLIP / 2 + 0.5).clamp(0, 1)
        outputs = leaf, v_old.flatten(1), target_of(v_old, e)
        expected = expected + nft_loss_reference(*outputs, TIME, r, WEIGHT, beta=BETA, clip=CLIP)
    (grad,) = torch.autograd.grad(expected, leaf)

    def run(v):
        return nft_loss(v, v_old, TIME, target, advantages, WEIGHT, beta=BETA, advantage_clip=CLIP)

    v.requires_grad_()
    loss, statistics = (torch.compile(run, fullgraph=True) if compiled else run)(v)
    loss.backward()
    assert_within(loss, expected, relative=1e-6, of_largest=0)
    assert_within(gradient_of(v), grad.view_as(v), relative=0, of_largest=1e-6)
    # The advantage of 9, of one sample or in halves of two, is beyond the clip range.
    assert float(statistics.clipped) == pytest.approx(0.3)


@pytest.fixture
def launch_path(monkeypatch):
    """Triton wherever the tensors are."""
    for module in modules_with("launches"):
        monkeypatch.setattr(module, "launches", lambda tensor: True)


def run_all(masked, several, device):
    """Every form of loss and the moments on the path that is set, with their gradients of v and v_uncond."""
    v, v_old, target, _ = make(SHAPES[1], torch.float32, SCALES["v"])
    mask = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    advantages = torch.stack([ADVANTAGES, ADVANTAGES.flip(0)], 1) if several else ADVANTAGES
    assert isinstance(target.key, NoiseKey)
    key = NoiseKey(target.key.seed, target.key.words.to(device))
    target = MatchingTarget(target.x0.to(device), key, *(torch.as_tensor(c).float().to(device) for c in target[2:]))
    v, v_old, a, w, t = (value.to(device) for value in (v, v_old, advantages, WEIGHT, TIME))
    more = {"mask": None if mask is None else mask.to(device), "guidance_scale": 1.5}
    reference = {"v_reference": v_old.flip(2).contiguous(), "kl_weight": 0.1}
    clip = {"clip_low": 0.02, "clip_high": 0.01, "dual_clip": 1.5, "dppo_threshold": 1e-3}
    found = []
    for form in ("moments", "matching", "huber", "nft"):
        leaves = v.clone().requires_grad_(), v_old.flip(1).contiguous().requires_grad_()
        more["v_uncond"] = leaves[1]
        if form == "moments":
            moments = shift_moments(leaves[0], v_old, t, t, target, residuals=BETA, **more)
            loss, rest = (moments.P + 2 * moments.Q).sum(), torch.stack(moments)
        elif form == "nft":
            settings = {"beta": BETA, "advantage_clip": CLIP}
            loss, rest = nft_loss(leaves[0], v_old, t, target, a, w, **settings, **more, **reference)
        else:
            loss, rest = grpo_loss(leaves[0], v_old, t, t, target, a, w, ratio=form, **clip, **more, **reference)
        (2 * loss).backward()
        rest = rest if isinstance(rest, torch.Tensor) else rest.values
        found.append([x.detach().cpu() for x in (loss, rest, gradient_of(leaves[0]), gradient_of(leaves[1]))])
    return found


@pytest.mark.parametrize("masked, several", [(False, False), (True, True)])
def test_kernels_equal_the_cpu_path(masked, several, request):
    expected = run_all(masked, several, "cpu")
    request.getfixturevalue("launch_path")
    for form, wanted in zip(run_all(masked, several, KERNEL_DEVICE), expected, strict=True):
        for index, (a, b) in enumerate(zip(form, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()), msg=f"{index}")
