"""gaussian_step's guidance and its other outputs: against the oracle, the kernel, the replay, and their refusals."""

from typing import Any

import pytest
import torch
from support.kernel_cases import ULP, assert_within, gradient_of, make_case, on_device

from fastgrpo_kernels import gaussian_step, log_prob, shift_moments
from fastgrpo_kernels.gaussian_step import paths
from fastgrpo_kernels.gaussian_step.reference import gaussian_step_reference

SCALE = torch.tensor([4.5, 2.0, 1.0], dtype=torch.float64)
CLEAN = (1.0, torch.tensor([-0.9, -0.5, -0.1], dtype=torch.float64))


def guided_case(dtype):
    """A case whose guided outputs are exact in every dtype, so that the interpreter's truncation is one too."""
    case, generator = make_case((3, 4, 10, 25), torch.float32), torch.Generator().manual_seed(5)
    v, uncond = (torch.randint(-9, 9, case.v.shape, generator=generator).to(dtype) / 8 for _ in range(2))
    guided = uncond.double() + SCALE.view(-1, 1, 1, 1) * (v.double() - uncond.double())
    assert torch.equal(guided.to(dtype).double(), guided)
    return case, v, uncond, guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("explicit", [False, True])
def test_every_output_on_both_paths(dtype, explicit):
    case, v, uncond, guided = guided_case(dtype)
    noise = case.eps if explicit else case.key
    found = gaussian_step(
        case.x, v, case.a, case.b, case.s, noise, v_uncond=uncond, guidance_scale=SCALE, return_all=True, clean=CLEAN,
        out_dtype=dtype,
    )  # fmt: skip
    eps, words = (case.eps, None) if explicit else (None, case.key.words)
    step = paths.Step(
        case.x, v, case.a, case.b, case.s, eps, words, case.key.seed, dtype, uncond, SCALE, *CLEAN, True, True
    )
    moved = on_device(step)
    expected = gaussian_step_reference(case.x, guided, case.a, case.b, case.s, case.eps)
    clean = gaussian_step_reference(case.x, guided, *CLEAN, 0.0, case.eps)
    relative = 0 if dtype == torch.float32 else ULP[dtype]
    for y, value, sample, kept in (found, paths.launch_gaussian_step(moved)):
        assert sample is not None
        assert kept is not None
        assert value is not None
        assert y.dtype == sample.dtype == kept.dtype == dtype
        assert_within(y, expected, relative=relative, of_largest=2e-6)
        assert_within(sample, clean, relative=relative, of_largest=1e-6)
        assert torch.equal(kept.cpu().double(), guided)
        # Of the latents as stored.
        stored = log_prob(case.x, kept.cpu(), y.cpu(), case.a, case.b, case.s)
        torch.testing.assert_close(value.cpu(), stored, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_with_the_same_guidance_is_exactly_on_policy(dtype):
    case = make_case((3, 5, 1001), dtype)
    guidance: dict[str, Any] = {"v_uncond": case.v_old, "guidance_scale": 4.5}
    step = gaussian_step(case.x, case.v, case.a, case.b, case.s, case.key, return_all=True, **guidance)
    assert step.v is not None
    p, q = shift_moments(case.v, step.v, case.b, case.s, case.key, **guidance)
    assert torch.count_nonzero(p) == torch.count_nonzero(q) == 0


def test_returns_none_for_what_has_no_meaning():
    case = make_case((3, 4, 10), torch.float32)
    step = gaussian_step(case.x, case.v, 1.0, -0.1, 0.0, None, return_all=True)
    assert step.log_prob is step.clean is step.v is None
    assert torch.equal(step.latents, gaussian_step(case.x, case.v, 1.0, -0.1, 0.0, None))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_both_branches(compiled):
    case, v, uncond, _ = guided_case(torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (case.x, v, uncond)]
    weight = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(6))

    def loss(x, v, uncond):
        y = gaussian_step(x, v, case.a, case.b, case.s, case.key, v_uncond=uncond, guidance_scale=SCALE)
        return (y * weight).sum()

    (torch.compile(loss, fullgraph=True) if compiled else loss)(*leaves).backward()
    a, b, g = (c.view(-1, 1, 1, 1) for c in (case.a, case.b, SCALE))
    for leaf, factor in zip(leaves, (a, b * g, b * (1 - g)), strict=True):
        assert_within(gradient_of(leaf), factor * weight, relative=ULP[leaf.dtype], of_largest=4e-7)


def test_registration():
    case, v, uncond, _ = guided_case(torch.bfloat16)
    x, rows = case.x.clone().requires_grad_(), (case.a, case.b, case.s)
    operator = torch.ops.fastgrpo_kernels.gaussian_step.default
    inputs = x, v.requires_grad_(), *rows, None, case.key.words, 5, torch.bfloat16, uncond.requires_grad_(), SCALE
    torch.library.opcheck(operator, inputs)
    plain = x.detach(), v.detach(), *rows, case.eps, None, 0, torch.float32, uncond.detach(), SCALE, SCALE, SCALE
    torch.library.opcheck(operator, (*plain, True, True))


def refusals():
    case = make_case((2, 3, 20), torch.float32)
    x, v, key, rows = case.x, case.v, case.key, (case.a, case.b, case.s)
    grad = v.clone().requires_grad_()
    call: Any = gaussian_step
    return [
        (lambda: gaussian_step(x, v, *rows, key, v_uncond=v), "guidance_scale: v_uncond needs a scale"),
        (lambda: gaussian_step(x, v, *rows, key, guidance_scale=2.0), "v_uncond: guidance_scale needs"),
        (lambda: gaussian_step(x, v, *rows, key, v_uncond=v[:1], guidance_scale=2.0), "v_uncond: expected shape"),
        (lambda: gaussian_step(x, grad, *rows, key, return_all=True), "return_all: has no gradient"),
        (lambda: gaussian_step(x, v, 1.0, 1.0, 0.0, key, return_all=True), "s: must be positive"),
        (lambda: call(x, v, *rows, key, clean=CLEAN), "clean: is returned with return_all=True"),
        (lambda: gaussian_step(x, v, *rows, key, clean=(1.0, float("inf")), return_all=True), "clean: must be finite"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    call, message = refusals()[index]
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_other_types():
    case = make_case((2, 3, 20), torch.float32)
    arguments = case.x, case.v, case.a, case.b, case.s, case.key
    call: Any = gaussian_step
    for clean in (1.0, [1.0]):
        with pytest.raises(TypeError, match="clean: expected the coefficients"):
            call(*arguments, return_all=True, clean=clean)
    with pytest.raises(TypeError, match="return_all: expected True or False, got str"):
        call(*arguments, return_all="yes")
