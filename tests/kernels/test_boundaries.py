"""Sizes that are too large to run whole without a GPU: chosen programs of the real launches, in the interpreter.

Latents of more than 2³¹ elements are allocated and not touched but for the blocks that the chosen programs read, so
they cost address space, not memory. tests/gpu runs the whole of them.
"""

import pytest
import torch
from support.kernel_cases import make_case

from fastgrpo_kernels import NoiseKey, _launch, clipped_loss, shift_moments, transitions
from fastgrpo_kernels.clipped_loss import op as clipped
from fastgrpo_kernels.gaussian_step import paths
from fastgrpo_kernels.noise import random_words
from fastgrpo_kernels.on_policy_gradient import op as on_policy
from fastgrpo_kernels.shift_moments import op as moments
from fastgrpo_kernels.shift_moments.inputs import Shift

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter; tests/gpu runs it whole")
ROWS = 100_000
BEYOND = 2**31 + 1000
BLOCK = 2048


@pytest.fixture
def only(monkeypatch):
    """A function that restricts launches of so many programs to chosen ones, and counts those launches."""
    from triton.runtime import interpreter

    launches: list[int] = []

    def restrict(programs, *chosen):
        def range_(*limits):
            if limits != (programs,):
                return range(*limits)
            launches.append(programs)
            return [pid % programs for pid in chosen]

        monkeypatch.setattr(interpreter, "range", range_, raising=False)
        # Tensors are on the CPU already: nothing to copy back, page by page.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
        return launches

    return restrict


def test_a_hundred_thousand_rows(only):
    launches = only(ROWS, 0, 65_535, 65_536, -1)
    rows = torch.tensor([0, 65_535, 65_536, ROWS - 1])
    case = make_case((ROWS, 3), torch.float32)
    b, s = case.b.float(), case.s.float()
    P, Q, *_ = moments.launch_shift_moments(Shift(case.v, case.v_old, b, s, None, case.key.words, case.key.seed))
    p, q = shift_moments(
        case.v[rows], case.v_old[rows], b[rows], s[rows], NoiseKey(case.key.seed, case.key.words[rows])
    )
    torch.testing.assert_close(P[rows], p, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(Q[rows], q, rtol=1e-5, atol=1e-8)
    step = paths.Step(case.x, case.v, 1.0, 0.5, 0.3, case.eps, None, 0, torch.float32)
    y = paths.launch_gaussian_step(step)[0]
    torch.testing.assert_close(y[rows], case.x[rows] + 0.5 * case.v[rows] + 0.3 * case.eps[rows], rtol=0, atol=1e-6)
    assert len(launches) == 2


def test_the_loss_of_a_hundred_thousand_rows():
    generator = torch.Generator().manual_seed(0)
    # Ratios away from the clip's edge, where rounding decides.
    P = 1e-4 * (torch.randint(-3, 3, (ROWS,), generator=generator) + 0.5)
    Q, advantage = (scale * torch.randn(ROWS, generator=generator) for scale in (1e-6, 1.0))
    objective = clipped.Objective("gaussian", 1e-4, 1e-4, None, None, 0.0, 1.0)
    loss, _, factors = clipped.launch_clipped_loss(P, Q.abs(), 0.3, advantage, 1 / ROWS, None, objective)
    P.requires_grad_()
    expected, _ = clipped_loss(P, Q.abs(), 0.3, advantage, 1 / ROWS, clip_low=1e-4, clip_high=1e-4)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(factors[0], P.grad, rtol=1e-5, atol=1e-12)


def last_noise(key, elements, count):
    """ε of the last `count` elements of rows whose length is a multiple of four, from the noise's definition."""
    first = (elements - count) // 4
    groups = torch.arange(first, elements // 4)
    from fastgrpo_kernels.noise import _philox

    w = _philox(groups, key.words, key.seed)
    pairs = []
    for a in (0, 2):
        radius = (-2 * (w[a].float() * 2.0**-32 + 2.0**-33).log()).sqrt().double()
        angle = w[a + 1].double() * (2 * torch.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)


def test_the_noise_of_the_last_elements_is_the_definitions():
    case = make_case((2, 4096), torch.float32)
    torch.testing.assert_close(last_noise(case.key, 4096, 1000), case.eps[:, -1000:].double(), rtol=0, atol=1e-6)
    assert random_words(case.key, 8).shape == (2, 8)


def test_a_row_of_more_than_two_to_the_31_elements(only):
    """The last block of the last of two rows: offsets of 2³² elements, noise counters beyond 2²⁹."""
    blocks = -(-BEYOND // BLOCK)
    launches = only(2 * blocks, -1)
    case = make_case((2, 8), torch.bfloat16)
    weight = torch.tensor([1.0, -0.5])
    _, b, s = transitions.dance_sde(0.7, 0.6, 0.3)
    shape = (2, BEYOND)
    eps, words, seed = None, case.key.words, case.key.seed
    tail = BEYOND - (blocks - 1) * BLOCK
    expected = last_noise(case.key, BEYOND, tail)[1:]

    gradient = on_policy.launch_on_policy_gradient(weight, b, s, eps, words, seed, shape, torch.bfloat16)
    factor = 0.5 * b / s / BEYOND
    torch.testing.assert_close(gradient[1:, -tail:].double() / factor, expected, rtol=2**-7, atol=1e-6)
    del gradient

    v, v_old = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for latents in (v, v_old):
        latents[1, -tail:] = torch.randn(tail, generator=generator)
    change = (v[1:, -tail:].double() - v_old[1:, -tail:].double()) * (b / s)
    shift = Shift(v, v_old, b, s, eps, words, seed)
    factors = torch.tensor([[0.0, 1.0], [0.0, 0.5]])
    (grad, _) = moments.launch_shift_moments_backward(factors[0], factors[1], shift)
    wanted = (b / s) * (expected + change) / BEYOND
    torch.testing.assert_close(
        grad[1:, -tail:].double() / (b / s / BEYOND), wanted / (b / s / BEYOND), rtol=2**-7, atol=1e-5
    )
    assert len(launches) == 2
    assert _launch.rows(v).data_ptr() == v.data_ptr()
