"""shift_moments: P, Q and their gradient against the float64 oracle, accuracy, bits, registration, refusals."""

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, SHAPES, ULP, assert_within, gradient_of, make_case, on_device
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import NoiseKey, shift_moments
from fastgrpo_kernels.shift_moments import op
from fastgrpo_kernels.shift_moments.inputs import Shift
from fastgrpo_kernels.shift_moments.reference import shift_moments_reference

# Sums are float32; P's terms cancel, so its error is measured against mean|d·ε|.
MOMENT = 5e-7
GRADIENT = 1e-6


def oracle(case, grad_p, grad_q):
    """(P, Q, mean|d·ε|, ∂(grad_p·P + grad_q·Q)/∂v) in float64."""
    v = case.v.double().requires_grad_()
    p, q = shift_moments_reference(v, case.v_old, case.b, case.s, case.eps)
    (p * grad_p + q * grad_q).sum().backward()
    scale = (case.b / case.s).view(-1, 1)
    size = (scale * (case.v.double() - case.v_old.double()).flatten(1) * case.eps.double().flatten(1)).abs().mean(1)
    return p.detach(), q.detach(), size, v.grad


def weights(batch, terms="PQ"):
    """Incoming gradients of P and Q; each term of the gradient is also looked at alone, since ε's dwarfs the other."""
    grads = torch.randn(2, batch, generator=torch.Generator().manual_seed(1))
    return grads[0] * ("P" in terms), grads[1] * ("Q" in terms)


def check(case, p, q, grad_v, grad_p, grad_q):
    expected_p, expected_q, size, expected_grad = oracle(case, grad_p.double(), grad_q.double())
    assert p.dtype == q.dtype == torch.float32
    assert ((p.detach().double().cpu() - expected_p).abs() <= MOMENT * size).all()
    assert_within(q, expected_q, relative=MOMENT, of_largest=0)
    dtype = case.v.dtype
    assert grad_v.dtype == dtype
    relative = 0 if dtype == torch.float32 else ULP[dtype]
    # The smallest float16 is 6e-8: gradients below it are lost.
    floor = 6e-8 / float(expected_grad.abs().max()) if dtype == torch.float16 else 0
    assert_within(grad_v, expected_grad, relative=relative, of_largest=GRADIENT + floor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("terms", ["P", "Q", "PQ"])
def test_cpu_path_matches_the_oracle(shape, dtype, explicit, terms):
    case = make_case(shape, dtype)
    grad_p, grad_q = weights(shape[0], terms)
    v = case.v.clone().requires_grad_()
    p, q = shift_moments(v, case.v_old, case.b, case.s, case.eps if explicit else case.key)
    (p * grad_p + q * grad_q).sum().backward()
    check(case, p, q, v.grad, grad_p, grad_q)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explicit", [False, True])
def test_kernels_match_the_oracle(shape, dtype, explicit):
    case = make_case(shape, dtype)
    v, v_old, b, s = (t.to(KERNEL_DEVICE) for t in (case.v, case.v_old, case.b, case.s))
    eps, words = (case.eps.to(KERNEL_DEVICE), None) if explicit else (None, case.key.words.to(KERNEL_DEVICE))
    p, q, *_ = op.launch_shift_moments(Shift(v, v_old, b, s, eps, words, case.key.seed))
    for terms in ("P", "Q", "PQ"):
        grad_p, grad_q = weights(shape[0], terms)
        grads = grad_p.to(KERNEL_DEVICE), grad_q.to(KERNEL_DEVICE)
        grad_v, _ = op.launch_shift_moments_backward(*grads, Shift(v, v_old, b, s, eps, words, case.key.seed))
        check(case, p, q, grad_v, grad_p, grad_q)


@pytest.mark.parametrize("shift", [0.01, pytest.param(0.1, marks=pytest.mark.full), 1.0])
@pytest.mark.parametrize("path", ["cpu", "compiled", "kernel"])
def test_log_ratio_accuracy_at_a_million_elements(shift, path):
    """<= 1e-9 at rms(d) <= 0.1; else <= 2 ulp of Q/2."""
    case = make_case((1, 16, 256, 256), torch.float32)
    b, s = torch.tensor([-0.07], dtype=torch.float32), torch.tensor([0.11], dtype=torch.float32)
    v_old = case.v + shift * (0.11 / 0.07) * torch.randn(case.v.shape, generator=torch.Generator().manual_seed(2))
    expected_p, expected_q = shift_moments_reference(case.v, v_old, b.double(), s.double(), case.eps)
    assert expected_q.sqrt().item() == pytest.approx(shift, rel=0.01)
    if path == "cpu":
        p, q = shift_moments(case.v, v_old, b, s, case.eps)
    elif path == "compiled":
        p, q = torch.compile(shift_moments, fullgraph=True)(case.v, v_old, b, s, case.eps)
    else:
        p, q, *_ = op.launch_shift_moments(on_device(Shift(case.v, v_old, b, s, case.eps)))
    error = ((p - q / 2).cpu().double() - (expected_p - expected_q / 2)).abs().item()
    half = (expected_q / 2).float()
    ulp = (torch.nextafter(half, half + 1) - half).item()
    assert error <= (1e-9 if shift <= 0.1 else 2 * ulp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_policy_moments_are_exactly_zero(dtype):
    case = make_case((3, 5, 1001), dtype)
    for p, q in (
        shift_moments(case.v, case.v.clone(), case.b, case.s, case.key),
        op.launch_shift_moments(on_device(
            Shift(case.v, case.v.clone(), case.b, case.s, None, case.key.words, case.key.seed)
        ))[:2],
    ):  # fmt: skip
        assert torch.count_nonzero(p) == torch.count_nonzero(q) == 0


# The last is beyond ATen's parallel grain of 32768 elements, where threads would split a plain sum over one row.
@pytest.mark.parametrize("batch, elements", [(64, 1), (64, 63), (64, 4097), (12, 70_000)])
def test_row_bits_depend_on_neither_batch_nor_threads(batch, elements):
    case = make_case((batch, 1, elements), torch.float32)

    def run(rows):
        v = case.v[rows].clone().requires_grad_()
        key = NoiseKey(case.key.seed, case.key.words[rows])
        p, q = shift_moments(v, case.v_old[rows], case.b[rows], case.s[rows], key)
        (p + q).sum().backward()
        return p.detach(), q.detach(), gradient_of(v)

    full = run(slice(None))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(11, 12), slice(3, 9)):
                assert all(torch.equal(part, whole[rows]) for part, whole in zip(run(rows), full, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_kernel_row_bits_do_not_depend_on_the_batch():
    case = make_case((5, 1, 4100), torch.bfloat16)
    v, v_old, b, s, words = (t.to(KERNEL_DEVICE) for t in (case.v, case.v_old, case.b, case.s, case.key.words))
    p, q, *_ = op.launch_shift_moments(Shift(v, v_old, b, s, None, words, 3))
    row = slice(2, 3)
    alone = op.launch_shift_moments(Shift(v[row], v_old[row], b[row], s[row], None, words[row], 3))
    assert torch.equal(alone[0], p[row])
    assert torch.equal(alone[1], q[row])


def test_strided_outputs_and_float_coefficients():
    case = make_case((3, 6, 40), torch.bfloat16)
    wide = torch.cat([case.v, case.v], dim=1)
    dense = shift_moments(case.v, case.v_old, -0.1, 0.2, case.key)
    strided = shift_moments(wide[:, :6], case.v_old.transpose(1, 2).contiguous().transpose(1, 2), -0.1, 0.2, case.key)
    assert all(torch.equal(x, y) for x, y in zip(dense, strided, strict=True))
    kernel = op.launch_shift_moments(Shift(
        wide.to(KERNEL_DEVICE)[:, :6], case.v_old.to(KERNEL_DEVICE), -0.1, 0.2,
        None, case.key.words.to(KERNEL_DEVICE), case.key.seed,
    ))  # fmt: skip
    torch.testing.assert_close(kernel[0].cpu(), dense[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kernel[1].cpu(), dense[1], rtol=1e-6, atol=0)


def test_compiles_with_gradient():
    case = make_case((3, 5, 20), torch.bfloat16)
    v, reference = case.v.clone().requires_grad_(), case.v.clone().requires_grad_()

    def loss(v, words):
        p, q = shift_moments(v, case.v_old, case.b, case.s, NoiseKey(case.key.seed, words))
        return (torch.exp(p - q / 2) * torch.tensor([1.0, -2.0, 0.5])).sum()

    torch.compile(loss, fullgraph=True)(v, case.key.words).backward()
    loss(reference, case.key.words).backward()
    # Inductor's exp is its own.
    assert_within(gradient_of(v), gradient_of(reference), relative=ULP[torch.bfloat16], of_largest=1e-6)


def test_registration():
    case = make_case((2, 3, 20), torch.bfloat16)
    v = case.v.clone().requires_grad_()
    operator = torch.ops.fastgrpo_kernels.shift_moments.default
    torch.library.opcheck(operator, (v, case.v_old, case.b, case.s, None, case.key.words, 5))
    torch.library.opcheck(operator, (v, case.v_old, case.b, case.s, case.eps, None, 0))
    backward = torch.ops.fastgrpo_kernels.shift_moments_backward.default
    torch.library.opcheck(
        backward, (*weights(2), torch.empty(0), case.v, case.v_old, case.b, case.s, None, case.key.words, 5)
    )


def test_runs_under_fake_tensors_with_gradient():
    with FakeTensorMode():
        v = torch.randn(4, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        v_old, row = torch.randn(4, 3, 8, dtype=torch.bfloat16), torch.rand(4, dtype=torch.float64)
        key = NoiseKey(3, torch.zeros(4, 3, dtype=torch.int32))
        p, q = shift_moments(v, v_old, row, row, key)
        (p + q).sum().backward()
        assert gradient_of(v).shape == v.shape
        assert gradient_of(v).dtype == torch.bfloat16
        # The ATen bodies themselves read no value either.
        shift = Shift(v.detach(), v_old, row, row, None, key.words, 3)
        grad, _ = op.shift_moments_backward_cpu(*op.moments_cpu(shift, mean_of_masked=True)[:2], shift)
        assert grad.shape == v.shape


def test_operator_keeps_only_its_inputs_for_the_backward():
    case = make_case((2, 3, 50), torch.float32)
    v, kept = case.v.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        torch.ops.fastgrpo_kernels.shift_moments(v, case.v_old, case.b, case.s, None, case.key.words, 5)
    latent_sized = {t.data_ptr() for t in kept if t.numel() >= v.numel()}
    assert latent_sized == {v.data_ptr(), case.v_old.data_ptr()}


def refusals():
    case = make_case((2, 3, 20), torch.float32)
    v, v_old, b, s, key = case.v, case.v_old, case.b, case.s, case.key
    return [
        (TypeError, lambda: shift_moments(v.long(), v_old, b, s, key), "v: expected float32"),
        (TypeError, lambda: shift_moments(v, v_old.double(), b, s, key), "v_old: expected float32, bfloat16"),
        (ValueError, lambda: shift_moments(v, v_old[:1], b, s, key), "v_old: expected shape"),
        (ValueError, lambda: shift_moments(v, v_old, b, s * 0, key), "s: must be positive"),
        (ValueError, lambda: shift_moments(v, v_old, -0.1, 0.0, key), "s: must be positive"),
        (ValueError, lambda: shift_moments(v, v_old, b * float("nan"), s, key), "b: must be finite"),
        (TypeError, lambda: shift_moments(v, v_old, b, s, None), "noise: expected the step's NoiseKey"),
        (ValueError, lambda: shift_moments(v, v_old.clone().requires_grad_(), b, s, key), "v_old: requires a gradient"),
        (ValueError, lambda: shift_moments(v, v_old, b, s.clone().requires_grad_(), key), "s: requires a gradient"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    error, call, message = refusals()[index]
    with pytest.raises(error, match=message):
        call()


def test_refuses_double_backward():
    case = make_case((2, 3, 20), torch.float32)
    v = case.v.clone().requires_grad_()
    _, q = shift_moments(v, case.v_old, case.b, case.s, case.key)
    with pytest.raises(ValueError, match="no double backward"):
        torch.autograd.grad(q.sum(), v, create_graph=True)


class NoGradient(torch.autograd.Function):
    """Passes nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return None


def test_a_loss_that_passes_nothing_back_leaves_no_gradient():
    v_old = torch.randn(2, 3, 4)
    v = v_old.clone().requires_grad_()
    P, _ = shift_moments(v, v_old, 1.0, 1.0, torch.randn(2, 3, 4))
    NoGradient.apply(P).sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert v.grad is None
