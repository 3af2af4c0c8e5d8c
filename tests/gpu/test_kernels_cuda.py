"""What only a GPU can show: launches by the profiler, no synchronisation, bits, graphs, streams, boundaries.

`pytest tests/kernels` on a GPU runs the kernels themselves against their oracles; `make gpu-check` runs both.
"""

from typing import Any

import pytest
import torch

import fastgrpo_kernels as fk

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HUNYUAN = (8, 16, 14, 60, 104)
CLIP: dict[str, Any] = {"clip_low": 1e-4, "clip_high": 1e-4}


class Case:
    def __init__(self, shape, dtype=torch.bfloat16):
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda: torch.randn(shape, generator=generator, device=DEVICE)  # noqa: E731
        self.x, v = draw(), draw()
        self.v_old = (v + 0.05 * draw()).to(dtype)
        self.v = v.to(dtype).requires_grad_()
        self.coefficients = fk.transitions.dance_sde(0.7, 0.65, 0.3)
        self.b, self.s = self.coefficients[1:]
        self.key = fk.noise_key(7, torch.arange(shape[0]), 3, 0, fk.STREAM_SDE, DEVICE)
        self.advantage = torch.linspace(-1, 1, shape[0], device=DEVICE)

    def loss(self):
        weight = 1 / len(self.v)
        return fk.grpo_loss(self.v, self.v_old, self.b, self.s, self.key, self.advantage, weight, **CLIP)[0]

    def moments(self):
        return fk.shift_moments(self.v, self.v_old, self.b, self.s, self.key)

    def rollout(self):
        return fk.gaussian_step(self.x, self.v.detach(), *self.coefficients, self.key, return_all=True)


@pytest.fixture
def case():
    return Case(HUNYUAN)


def kernels_of(work):
    """Names of the kernels that a call launches, once it is warm."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]


def test_launches(case):
    output = case.loss()
    grad = torch.ones_like(output)
    assert len(kernels_of(case.loss)) == 1
    assert len(kernels_of(lambda: torch.autograd.grad(output, case.v, grad, retain_graph=True))) == 1
    assert len(kernels_of(case.moments)) == 1
    assert len(kernels_of(case.rollout)) == 1
    assert len(kernels_of(lambda: fk.log_prob(case.x, case.v, case.x, *case.coefficients))) == 1
    shape = case.v.shape
    on_policy = lambda: fk.on_policy_gradient(case.advantage, case.b, case.s, case.key, shape, case.v.dtype)  # noqa: E731
    assert len(kernels_of(on_policy)) == 1


def test_nothing_waits_for_the_device(case):
    # The first calls compile.
    case.loss().backward()
    case.rollout()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.rollout()
        case.loss().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_run_to_run_and_alone_or_in_a_batch_of_64(dtype):
    case = Case((64, 16, 5, 33, 41), dtype)
    first, again = case.moments(), case.moments()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    gradients = [torch.autograd.grad(case.loss(), case.v)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    for row in (0, 37, 63):
        alone = fk.NoiseKey(case.key.seed, case.key.words[row : row + 1])
        rows = slice(row, row + 1)
        found = fk.shift_moments(case.v[rows], case.v_old[rows], case.b, case.s, alone)
        assert all(torch.equal(a, b[rows]) for a, b in zip(found, first, strict=True))
        step = fk.gaussian_step(case.x[rows], case.v[rows].detach(), *case.coefficients, alone, return_all=True)
        assert torch.equal(step.latents, case.rollout().latents[rows])
        whole = case.rollout().log_prob
        assert step.log_prob is not None
        assert whole is not None
        assert torch.equal(step.log_prob, whole[rows])


def test_moments_and_gradient_at_full_size_against_float64():
    case = Case((2, 2**20), torch.float32)
    eps = fk.normal(case.key, case.v.shape[1:])
    v = case.v.detach().double().requires_grad_()
    d = case.b / case.s * (v - case.v_old.double())
    p, q = (d * eps.double()).mean(1), d.square().mean(1)
    P, Q = case.moments()
    error = (P.double() - Q.double() / 2) - (p - q / 2)
    bound = 2 * 2.0**-24 * (q / 2).clamp(min=1e-9 * 2**23)
    assert (error.abs() <= bound).all()
    expected = torch.autograd.grad((p + q).sum(), v)[0]
    found = torch.autograd.grad((P + Q).sum(), case.v)[0]
    assert (found.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_captured_graph_replays(case):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = case.moments()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = case.moments()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b.detach()) for a, b in zip(captured, expected, strict=True))


def test_two_streams_at_once(case):
    expected = case.moments()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(case.moments())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))


def test_a_hundred_thousand_rows():
    case = Case((100_000, 3), torch.float32)
    case.loss().backward()
    P, Q = (t.detach().cpu() for t in case.moments())
    key = fk.NoiseKey(case.key.seed, case.key.words.cpu())
    p, q = fk.shift_moments(case.v.detach().cpu(), case.v_old.cpu(), case.b, case.s, key)
    torch.testing.assert_close(P, p, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Q, q, rtol=1e-4, atol=1e-8)
    assert case.v.grad is not None
    assert case.v.grad.isfinite().all()


def test_a_row_of_more_than_two_to_the_31_elements():
    elements = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * elements:
        pytest.skip("needs 22 GB of free memory")
    _, b, s = fk.transitions.dance_sde(0.7, 0.6, 0.3)
    key = fk.noise_key(3, [5], 2, 1, fk.STREAM_SDE, DEVICE)
    weight = torch.ones(1, device=DEVICE)
    gradient = fk.on_policy_gradient(weight, b, s, key, (1, elements), torch.bfloat16)
    assert (gradient[:, -1000:] != 0).all()
    v_old = torch.zeros_like(gradient)
    v = v_old.clone()
    v[0, -1] = 1.0
    _, q = fk.shift_moments(v, v_old, b, s, key)
    assert float(q) == pytest.approx((b / s) ** 2 / elements, rel=1e-6)
