"""What surrounds a call in someone's trainer: defaults of torch, inference mode, NumPy numbers, floats that change."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_cases import gradient_of, make_case
from torch import Tensor

from fastgrpo_kernels import (
    STREAM_SDE,
    MatchingTarget,
    NoiseKey,
    StoredStep,
    gaussian_step,
    grpo_loss,
    log_prob,
    nft_loss,
    noise_key,
    normal,
    on_policy_backward,
    on_policy_gradient,
    random_words,
    shift_moments,
    transitions,
)
from fastgrpo_kernels.clipped_loss.op import check_objective
from fastgrpo_kernels.compat import GRPOLoss, awm, dance_grpo, ddpo, diffusion_nft, flow_grpo
from fastgrpo_kernels.noise import split_seed

CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 2e-3}
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5])
TIMES = torch.tensor([0.9, 0.5, 0.2])
# More than a block of sums, and than a row of one.
CASE = make_case((3, 4, 1100), torch.float32)
V, KEY, ROW = CASE.v, CASE.key, torch.ones(3)
NOTHING: Any = None


def calls(case=CASE) -> dict[str, Callable[[Tensor], Tensor]]:
    """Scalars to differentiate by v."""
    a, b, s, rows = case.a, case.b, case.s, (ADVANTAGES, 1 / 3)
    step, mask = StoredStep(case.x, case.v_old, a), torch.tensor([True, False, True, True]).expand(3, 4)
    target, dance = MatchingTarget(case.x, case.key), (0.3, torch.linspace(1, 0, 9), 4, case.v_old, True, True)
    guided: dict[str, Any] = {"v_uncond": case.x, "guidance_scale": 2.0}
    return {
        "gaussian_step": lambda v: gaussian_step(case.x, v, a, b, s, case.key).square().mean(),
        "log_prob": lambda v: log_prob(case.x, v, case.v_old, a, b, s).sum(),
        "shift_moments": lambda v: torch.stack(shift_moments(v, case.v_old, b, s, step, mask=mask)).sum(),
        "grpo_loss": lambda v: grpo_loss(v, case.v_old, b, s, case.key, *rows, **CLIP)[0],
        "guided": lambda v: grpo_loss(v, case.v_old, b, s, case.eps, *rows, **CLIP, **guided)[0],
        "nft_loss": lambda v: nft_loss(v, case.v_old, TIMES, target, *rows, beta=0.5, advantage_clip=5.0)[0],
        "GRPOLoss": lambda v: GRPOLoss(**CLIP)(v, case.v_old, b, s, case.key, ADVANTAGES)[0],
        "flux_step": lambda v: dance_grpo.flux_step(v, case.x, *dance)[2].sum(),
    }


def gradient(call):
    """(value, gradient by v) of a call."""
    v = CASE.v.clone().requires_grad_()
    value = call(v)
    value.backward()
    return value.detach(), gradient_of(v)


def equal(found, expected):
    return all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


@contextmanager
def default(name):
    """A default device that has no memory, or a default dtype that is wider."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = pytest.mark.parametrize("other", ["meta", "float64"])


@DEFAULTS
@pytest.mark.parametrize("name", calls())
def test_latents_follow_no_default(name, other):
    call = calls()[name]
    expected = gradient(call)
    with default(other):
        assert equal(gradient(call), expected)


@DEFAULTS
def test_noise_follows_no_default(other):
    def draws():
        words = noise_key(1, [1, 2], [3, 4], 0, STREAM_SDE, "cpu").words
        return words, normal(KEY, (5,)), random_words(KEY, 3), on_policy_gradient(ROW, 0.1, 0.3, KEY, (3, 4, 5))

    expected = draws()
    with default(other):
        assert equal(draws(), expected)


@DEFAULTS
def test_schedules_follow_no_default(other):
    flow = SimpleNamespace(sigmas=torch.linspace(1, 0, 9), timesteps=1000 * torch.linspace(1, 0, 9)[:-1])
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=False)
    alphas = torch.linspace(0.999, 0.005, 1000)
    ddim = SimpleNamespace(alphas_cumprod=alphas, num_inference_steps=20, config=config)

    def log_probs():
        ddpo_step = ddpo.ddim_step_with_logprob(ddim, V, 401, CASE.x, 1.0, prev_sample=CASE.v_old)
        # At timestep 0 there is no noise, and no density.
        none = ddpo.ddim_step_with_logprob(ddim, V, 0, CASE.x, 1.0, prev_sample=CASE.v_old)
        times = [flow.timesteps[[1, 4, 5]], 875.0, [875.0, 500.0, 250.0]]
        flow_steps = [flow_grpo.sde_step_with_logprob(flow, V, t, CASE.x, prev_sample=CASE.v_old)[1] for t in times]
        return ddpo_step[1], none[1].isnan(), none[1].nan_to_num(), *flow_steps

    expected = log_probs()
    with default(other):
        assert equal(log_probs(), expected)


@pytest.mark.parametrize("name", calls())
def test_a_rollout_in_inference_mode_can_be_trained_on(name):
    expected = gradient(calls()[name])
    with torch.inference_mode():
        made = [t.clone() if isinstance(t, Tensor) else NoiseKey(t.seed, t.words.clone()) for t in CASE]
    assert equal(gradient(calls(CASE._make(made))[name]), expected)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
def test_numbers_of_numpy_are_numbers(number):
    arguments = CASE.v, CASE.v_old, CASE.key, ADVANTAGES

    def loss(of):
        v, v_old, key, advantages = arguments
        clip = {name: of(value) for name, value in CLIP.items()}
        return grpo_loss(v, v_old, of(0.125), of(0.25), key, advantages, of(0.5), **clip)[0]

    assert torch.equal(loss(number), loss(lambda value: float(number(value))))
    assert transitions.dance_sde(number(0.75), number(0.5), number(0.25)) == transitions.dance_sde(0.75, 0.5, 0.25)
    # What kernels and custom operators are given are Python's: they take no other.
    objective = check_objective(number(0.1), 0, "gaussian", number(2), number(0.5), number(1), "mean", None)
    assert {type(value) for value in objective[1:]} == {float}


def test_integers_of_numpy_are_integers():
    number: Any = np.int64(5)
    found, expected = (noise_key(n, [1, 2], n, n, STREAM_SDE, "cpu") for n in (number, 5))
    assert torch.equal(found.words, expected.words)
    assert {type(half) for half in split_seed(found.seed)} == {int}


def test_floats_that_change_from_call_to_call_stay_in_one_graph():
    """The second value makes a float dynamic in torch.compile, which then is none for math.isfinite."""

    def loss(v, b, s, weight, clip):
        return grpo_loss(v, CASE.v_old, b, s, CASE.key, ADVANTAGES, weight, clip_low=clip, clip_high=clip)[0]

    def step(v, a, b, s):
        return gaussian_step(CASE.x, v, a, b, s, CASE.key, return_all=False)

    for function, first in ((loss, (0.1, 0.3, 0.5, 1e-3)), (step, (0.9, 0.1, 0.3))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for scale in (1.0, 1.1, 1.3):
            numbers = [scale * value for value in first]
            torch.testing.assert_close(compiled(CASE.v, *numbers), function(CASE.v, *numbers), rtol=2e-6, atol=2e-6)


def test_weights_that_are_detached_are_so_in_forward_mode():
    # One block: sums of several, which go to places of their own, refuse forward mode.
    case = make_case((3, 4, 9), torch.float32)
    call, leaf = calls(case)["nft_loss"], case.v.clone().requires_grad_()
    found = torch.func.jvp(call, (case.v,), (case.eps,))[1]
    (expected,) = torch.autograd.grad(call(leaf), leaf)
    torch.testing.assert_close(found, (expected * case.eps).sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_prob(V, V, V, 1.0, ROW, 1 - ROW), ValueError,
         "s: must be positive for the step to have a density, got 0.0"),
        (lambda: log_prob(V, V, V, 1.0, ROW / 0, 1.0), ValueError, "b: must be finite, got inf"),
        (lambda: log_prob(V, V, V, None, 1.0, 1.0, a_less_one=ROW.clone().requires_grad_()), ValueError,
         "a_less_one: requires a gradient, but none flows into it; pass a_less_one.detach()"),
        (lambda: shift_moments(V, V, 1.0, 1.0, KEY, mask=ROW.bool().view(1, 3)), ValueError,
         "mask: expected the latents' shape [3, 4, 1100], its first dimensions, or 1 where they share it, got [1, 3]"),
        (lambda: transitions.ode(torch.linspace(0.5, 1, 600), torch.linspace(0.4, 1, 600)), ValueError,
         "sigma_next: must be smaller than sigma, got 1.0"),
        (lambda: transitions.ode(torch.ones(2), torch.zeros(3)), ValueError,
         "sigma, sigma_next: must have one shape, or broadcast to it, got [2], [3]"),
        (lambda: transitions.dance_sde(torch.ones(2), 0.5, NOTHING), TypeError,
         "eta: expected a float or a tensor, got NoneType"),
        (lambda: gaussian_step(V.to_sparse(), V, 1.0, 1.0, 1.0, KEY), TypeError,
         "x: expected dense latents, got torch.sparse_coo; pad what is ragged, and mask the padding"),
        (lambda: normal(KEY, (-2, -3)), ValueError, "shape_per_row: has a negative size, got [-2, -3]"),
        (lambda: on_policy_backward(NOTHING, ROW, 1.0, 1.0, KEY), TypeError, "v: expected a tensor, got NoneType"),
        (lambda: on_policy_gradient(ROW, 1.0, 1.0, ROW[0], (3, 4)), ValueError,
         "shape: has 3 samples, the noise is of shape []"),
        (lambda: awm.policy_loss(NOTHING, V, V, V, ROW, ROW, weighting="t", clip_range=0.1), TypeError,
         "model_output: expected a tensor, got NoneType"),
        (lambda: awm.policy_loss(V, NOTHING, V, V, ROW, ROW, weighting="t", clip_range=0.1), TypeError,
         "old_output: expected a tensor, got NoneType"),
        (lambda: awm.policy_loss(V, V, V, V, NOTHING, ROW, weighting="t**2", clip_range=0.1), TypeError,
         "t: expected a number, got NoneType"),
        (lambda: diffusion_nft.policy_loss(V, NOTHING, V, V, ROW, ROW, beta=1.0, adv_clip_max=5.0), TypeError,
         "old_prediction: expected a tensor, got NoneType"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_that_names_the_argument_and_what_is_wrong_in_it(call: Any, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
