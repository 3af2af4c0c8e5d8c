"""shift_moments from a stored step and with guidance, and grpo_loss, the same fused with the objective."""

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, ULP, assert_within, gradient_of, make_case, on_device
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import StoredStep, clipped_loss, gaussian_step, grpo_loss, shift_moments
from fastgrpo_kernels.clipped_loss import fused
from fastgrpo_kernels.clipped_loss.op import FIELDS, Objective
from fastgrpo_kernels.shift_moments import op
from fastgrpo_kernels.shift_moments.inputs import Shift
from fastgrpo_kernels.shift_moments.reference import shift_moments_reference

SCALE = 4.5
CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 2e-3}
# Of the largest.
GRADIENT = 1e-6


def make_shift(noise, guidance, dtype, shape=(3, 4, 10, 25), reference=False):
    """(arguments of one call, its ε in float64 or as drawn) for the noise and guidance asked for."""
    case = make_case(shape, dtype)
    fields: dict[str, Any] = {"v": case.v, "v_old": case.v_old, "b": case.b, "s": case.s}
    if guidance:
        generator = torch.Generator().manual_seed(9)
        # Multiples of an eighth: guided sums are exact in every dtype, so that the interpreter's truncation is one too.
        v, uncond, change = (torch.randint(-9, 9, shape, generator=generator).to(dtype) / 8 for _ in range(3))
        fields |= {"v": v, "v_uncond": uncond, "guidance": torch.tensor([4.5, 2.0, 1.0], dtype=torch.float64)}
        fields["v_old"] = (uncond + fields["guidance"].to(dtype).view(-1, 1, 1, 1) * (v - uncond) + change / 8).to(
            dtype
        )
    if reference:
        fields["v_reference"] = fields["v_old"].flip(-1).contiguous()
    eps = case.eps
    if noise == "key":
        fields |= {"words": case.key.words, "seed": case.key.seed}
    elif noise == "step":
        y = gaussian_step(case.x, fields["v_old"], case.a, case.b, case.s, case.key, out_dtype=torch.bfloat16)
        column = (-1, 1, 1, 1)
        mean = case.a.view(column) * case.x.double() + case.b.view(column) * fields["v_old"].double()
        eps = (y.double() - mean) / case.s.view(column)
        fields |= {"x": case.x, "y": y, "a_less_one": case.a - 1}
    else:
        fields["eps"] = case.eps
    return Shift(**fields), eps


def oracle(shift, eps):
    """(P, Q, the size of P's terms, gradients of P and of Q by v and v_uncond) in float64."""
    v = shift.v.double().requires_grad_()
    uncond = None if shift.v_uncond is None else shift.v_uncond.double().requires_grad_()
    guided = v
    if uncond is not None:
        scale = shift.guidance.view(-1, 1, 1, 1)
        guided = uncond + scale * (v - uncond)
    p, q = shift_moments_reference(guided, shift.v_old, shift.b, shift.s, eps)
    gradients = []
    for moment in (p, q):
        leaves = [v] if uncond is None else [v, uncond]
        gradients.append(torch.autograd.grad(moment.sum(), leaves, retain_graph=True))
    size = (eps.flatten(1).square().mean(1) * q).sqrt()
    return p.detach(), q.detach(), size, gradients


def public_noise(shift, case_seed):
    from fastgrpo_kernels import NoiseKey

    if shift.words is not None:
        return NoiseKey(case_seed, shift.words)
    return shift.eps if shift.x is None else StoredStep(shift.x, shift.y, shift.a_less_one + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("noise", ["key", "eps", "step"])
def test_moments_and_gradients_match_the_oracle(noise, guidance, dtype):
    shift, eps = make_shift(noise, guidance, dtype)
    p, q, size, gradients = oracle(shift, eps)
    zero, one = torch.zeros(3), torch.ones(3)
    with torch.no_grad():
        keywords = {"v_uncond": shift.v_uncond, "guidance_scale": shift.guidance}
        public = shift_moments(*shift[:4], public_noise(shift, shift.seed), **keywords)
    moved = on_device(shift)
    kernel = op.launch_shift_moments(moved)[:2]
    for found_p, found_q in (public, kernel):
        assert ((found_p.cpu().double() - p).abs() <= 1e-7 * size).all()
        assert_within(found_q, q, relative=1e-6, of_largest=0)
    for grad_p, grad_q, expected in ((one, zero, gradients[0]), (zero, one, gradients[1])):
        cpu = op.shift_moments_backward_cpu(grad_p, grad_q, shift)
        device = op.launch_shift_moments_backward(grad_p.to(KERNEL_DEVICE), grad_q.to(KERNEL_DEVICE), moved)
        for found in (cpu, device):
            for actual, gradient in zip(found, expected, strict=False):
                assert actual.dtype == dtype
                relative = 0 if dtype == torch.float32 else ULP[dtype]
                floor = 6e-8 / float(gradient.abs().max()) if dtype == torch.float16 else 0
                assert_within(actual, gradient, relative=relative, of_largest=GRADIENT + floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guided_output_is_rounded_before_use(dtype):
    """What guidance computes in float32 and rounds is, as v_old, exactly on policy."""
    case = make_case((3, 4, 10, 25), dtype)
    v_old = case.v_old.float() + SCALE * (case.v.float() - case.v_old.float())
    keywords = {"v_uncond": case.v_old, "guidance_scale": SCALE}
    p, q = shift_moments(case.v, v_old.to(dtype), case.b, case.s, case.key, **keywords)
    if dtype == torch.float32:
        assert q.max() < 1e-12
    else:
        assert torch.count_nonzero(p) == torch.count_nonzero(q) == 0


def test_guidance_needs_both_of_its_arguments():
    case = make_case((2, 3, 20), torch.float32)
    arguments = case.v, case.v_old, case.b, case.s, case.key
    with pytest.raises(ValueError, match="guidance_scale: v_uncond needs a scale"):
        shift_moments(*arguments, v_uncond=case.v)
    with pytest.raises(ValueError, match="v_uncond: guidance_scale needs the unconditional output"):
        shift_moments(*arguments, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale: must be finite"):
        shift_moments(*arguments, v_uncond=case.v, guidance_scale=float("nan"))
    with pytest.raises(TypeError, match=r"v_uncond: expected torch\.float32"):
        shift_moments(*arguments, v_uncond=case.v.half(), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"noise\.y: expected shape"):
        shift_moments(*arguments[:4], StoredStep(case.x, case.x[:1], 1.0))
    with pytest.raises(ValueError, match=r"noise\.a: must be finite"):
        shift_moments(*arguments[:4], StoredStep(case.x, case.x, float("nan")))


def loss_arguments(noise, guidance, dtype, reference, **settings):
    shift, _ = make_shift(noise, guidance, dtype, reference=reference)
    advantage, weight = torch.tensor([1.0, -0.7, 0.4]), torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    settings = {**CLIP, "kl_weight": 0.1 * reference, **settings}
    return shift, advantage, weight, settings


def run_unfused(shift, advantage, weight, settings):
    """The two operations one after another on the same values in float32, where gradients are not rounded before they
    are added: (loss, statistics, gradients of v and v_uncond)."""
    names = ("v", "v_old", "v_uncond", "v_reference")
    shift = shift._replace(**{n: getattr(shift, n).float() for n in names if getattr(shift, n) is not None})
    v = shift.v.clone().requires_grad_()
    uncond = None if shift.v_uncond is None else shift.v_uncond.clone().requires_grad_()
    noise, guidance = public_noise(shift, shift.seed), {"v_uncond": uncond, "guidance_scale": shift.guidance}
    P, Q = shift_moments(v, shift.v_old, shift.b, shift.s, noise, **guidance)
    reference = None
    if shift.v_reference is not None:
        reference = shift_moments(v, shift.v_reference, shift.b, shift.s, noise, **guidance)[1]
    loss, statistics = clipped_loss(P, Q, shift.s, advantage, weight, **settings, Q_reference=reference)
    loss.backward()
    return loss.detach(), statistics, [gradient_of(leaf) for leaf in (v, uncond) if leaf is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "noise, guidance, reference", [("key", False, False), ("eps", True, True), ("step", False, True)]
)
def test_fused_loss_equals_the_two_operations(noise, guidance, reference, dtype):
    shift, advantage, weight, settings = loss_arguments(noise, guidance, dtype, reference)
    expected, statistics, gradients = run_unfused(shift, advantage, weight, settings)
    v = shift.v.clone().requires_grad_()
    uncond = None if shift.v_uncond is None else shift.v_uncond.clone().requires_grad_()
    loss, found = grpo_loss(
        v, *shift[1:4], public_noise(shift, shift.seed), advantage, weight, **settings,
        v_reference=shift.v_reference, v_uncond=uncond, guidance_scale=shift.guidance,
    )  # fmt: skip
    # The incoming gradient counts, too.
    (2 * loss).backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(found.values, statistics.values)
    moved = on_device(shift)
    objective = Objective("gaussian", CLIP["clip_low"], CLIP["clip_high"], None, None, settings["kl_weight"], 1.0)
    rows = advantage.to(KERNEL_DEVICE), weight.to(KERNEL_DEVICE)
    kernel, numbers, factors = fused.launch_grpo_loss(*rows, objective, False, moved)
    torch.testing.assert_close(kernel.cpu(), expected, rtol=1e-5, atol=2e-6)
    for name, number, value in zip(FIELDS, numbers.cpu(), statistics.values, strict=True):
        torch.testing.assert_close(number, value, rtol=1e-5, atol=2e-6, msg=name)
    grad_p, grad_q, *grad_reference = factors.unbind(0)
    device = op.launch_shift_moments_backward(
        grad_p, grad_q, moved, grad_reference[0] if grad_reference else None, torch.full((), 2.0, device=KERNEL_DEVICE)
    )
    for index, gradient in enumerate(gradients):
        leaf = v if index == 0 else uncond
        assert leaf is not None
        for actual in (leaf.grad, device[index]):
            relative = 0 if dtype == torch.float32 else ULP[dtype]
            assert_within(actual, 2 * gradient.double(), relative=relative, of_largest=GRADIENT)


def test_fused_sum_convention():
    shift, advantage, weight, settings = loss_arguments("key", False, torch.float32, False)
    settings |= {"clip_low": 0.2, "clip_high": 0.3, "reduction": "sum"}
    P, Q = shift_moments(*shift[:4], public_noise(shift, shift.seed))
    expected, _ = clipped_loss(P, Q, shift.s, advantage, weight, **settings, elements=1000)
    loss, _ = grpo_loss(*shift[:4], public_noise(shift, shift.seed), advantage, weight, **settings)
    assert torch.equal(loss, expected)
    objective = Objective("gaussian", 0.2, 0.3, None, None, 0.0, 1000.0)
    kernel, _, _ = fused.launch_grpo_loss(
        advantage.to(KERNEL_DEVICE), weight.to(KERNEL_DEVICE), objective, False, on_device(shift)
    )
    torch.testing.assert_close(kernel.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", ["key", "step"])
def test_fused_compiles_with_gradient(noise):
    shift, advantage, weight, settings = loss_arguments(noise, True, torch.bfloat16, True)
    _, _, gradients = run_unfused(shift, advantage, weight, settings)
    assert shift.v_uncond is not None
    v, uncond = shift.v.clone().requires_grad_(), shift.v_uncond.clone().requires_grad_()
    v_old, b, s = shift[1:4]

    @torch.compile(fullgraph=True)
    def loss(v, uncond):
        return grpo_loss(
            v, v_old, b, s, public_noise(shift, shift.seed), advantage, weight, **settings,
            v_reference=shift.v_reference, v_uncond=uncond, guidance_scale=shift.guidance,
        )[0]  # fmt: skip

    loss(v, uncond).backward()
    assert_within(gradient_of(v), gradients[0], relative=ULP[torch.bfloat16], of_largest=GRADIENT)
    assert_within(gradient_of(uncond), gradients[1], relative=ULP[torch.bfloat16], of_largest=GRADIENT)


def test_registration():
    shift, advantage, weight, _ = loss_arguments("step", True, torch.bfloat16, True)
    assert shift.v_uncond is not None
    shift.v.requires_grad_()
    shift.v_uncond.requires_grad_()
    torch.library.opcheck(torch.ops.fastgrpo_kernels.shift_moments.default, op.without_reference(shift))
    objective = Objective("unit", 1e-3, 1e-3, 2.0, 1e-3, 0.1, 1.0)
    torch.library.opcheck(torch.ops.fastgrpo_kernels.grpo_loss.default, (advantage, weight, *objective, False, *shift))
    backward = torch.ops.fastgrpo_kernels.grpo_loss_backward.default
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in shift]
    torch.library.opcheck(backward, (torch.ones(()), torch.ones(3, 3), *plain))


def test_fused_runs_under_fake_tensors():
    with FakeTensorMode():
        v = torch.randn(4, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        x, row = torch.randn(4, 3, 8), torch.rand(4)
        step = StoredStep(x, x, 1.0)
        loss, statistics = grpo_loss(v, v.detach(), row, row, step, row, 0.25, **CLIP)
        loss.backward()
        assert gradient_of(v).shape == v.shape
        assert statistics.kl.dtype == torch.float32


@pytest.mark.parametrize("path", ["eager", "operator"])
def test_refuses(path):
    shift, advantage, weight, settings = loss_arguments("key", False, torch.float32, False)
    v, noise = shift.v.requires_grad_(), public_noise(shift, shift.seed)
    if path == "eager":
        loss = grpo_loss(v, *shift[1:4], noise, advantage, weight, **settings)[0]
        moment = shift_moments(v, *shift[1:4], noise)[0]
    else:
        objective = Objective("unit", 1e-3, 1e-3, None, None, 0.0, 1.0)
        loss = torch.ops.fastgrpo_kernels.grpo_loss(advantage, weight, *objective, False, *shift)[0]
        moment = torch.ops.fastgrpo_kernels.shift_moments(*op.without_reference(shift))[0]
    with pytest.raises(ValueError, match="grpo_loss: has no double backward"):
        torch.autograd.grad(loss, v, create_graph=True)
    with pytest.raises(ValueError, match="shift_moments: has no double backward"):
        torch.autograd.grad(moment.sum(), v, create_graph=True)
    with pytest.raises(ValueError, match="kl_weight: needs v_reference"):
        grpo_loss(v, *shift[1:4], noise, advantage, weight, **CLIP, kl_weight=0.1)
    with pytest.raises(ValueError, match="v_reference: requires a gradient"):
        grpo_loss(v, *shift[1:4], noise, advantage, weight, **CLIP, v_reference=v)
