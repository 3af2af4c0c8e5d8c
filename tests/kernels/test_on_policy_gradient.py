"""on_policy_gradient: against autograd through the ratio, against the loss it replaces, registration, refusals."""

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, SHAPES, ULP, assert_within, gradient_of, make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import NoiseKey, on_policy_backward, on_policy_gradient, shift_moments
from fastgrpo_kernels.on_policy_gradient import op
from fastgrpo_kernels.on_policy_gradient.reference import on_policy_gradient_reference

FLOAT32 = 4e-7


def advantages(batch):
    return torch.randn(batch, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explicit", [False, True])
def test_cpu_path_and_kernel_match_autograd_through_the_ratio(shape, dtype, explicit):
    case, advantage = make_case(shape, dtype), advantages(shape[0])
    expected = on_policy_gradient_reference(advantage, case.b, case.s, case.eps)
    # The smallest float16 is 6e-8.
    floor = 6e-8 / float(expected.abs().max()) if dtype == torch.float16 else 0
    relative = 0 if dtype == torch.float32 else ULP[dtype]
    grad = on_policy_gradient(advantage, case.b, case.s, case.eps if explicit else case.key, shape, dtype)
    assert grad.dtype == dtype
    assert_within(grad, expected, relative=relative, of_largest=FLOAT32 + floor)
    eps, words = (case.eps.to(KERNEL_DEVICE), None) if explicit else (None, case.key.words.to(KERNEL_DEVICE))
    weight, b, s = (t.to(KERNEL_DEVICE) for t in (advantage, case.b, case.s))
    kernel = op.launch_on_policy_gradient(weight, b, s, eps, words, case.key.seed, shape, dtype)
    assert kernel.dtype == dtype
    assert_within(kernel, expected, relative=relative, of_largest=FLOAT32 + 1e-6 * (not explicit) + floor)


def test_equals_the_gradient_of_the_loss_it_replaces():
    case, advantage = make_case((4, 3, 50), torch.float32), advantages(4)
    weight = torch.tensor([0.25, 0.25, 0.0, 0.25])
    parameter = torch.randn(case.v.shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
    v = parameter * 2
    p, q = shift_moments(v, v.detach().clone(), case.b, case.s, case.key)
    (-(weight * advantage) * torch.exp(p - q / 2)).sum().backward()
    expected, parameter.grad = gradient_of(parameter), None
    on_policy_backward(parameter * 2, weight * advantage, case.b, case.s, case.key)
    assert gradient_of(parameter)[2].count_nonzero() == 0
    assert_within(gradient_of(parameter), expected, relative=0, of_largest=FLOAT32)


def test_ascends_the_likelihood_of_a_good_sample():
    """Stepping against the gradient moves the mean towards the noise drawn where the advantage is positive."""
    case = make_case((2, 4, 100), torch.float32)
    grad = on_policy_gradient(torch.tensor([1.0, -1.0]), case.b, case.s, case.key, case.v.shape)
    p, _ = shift_moments(case.v - grad, case.v, case.b, case.s, case.key)
    assert p[0] > 0 > p[1]


def test_float_coefficients_and_strided_noise():
    case, advantage = make_case((3, 6, 40), torch.float32), advantages(3)
    dense = on_policy_gradient(advantage, -0.1, 0.2, case.eps, case.eps.shape)
    turned = case.eps.transpose(1, 2).contiguous().transpose(1, 2)
    strided = on_policy_gradient(advantage, -0.1, 0.2, turned, case.eps.shape)
    assert strided.is_contiguous()
    assert torch.equal(dense, strided)
    kernel = op.launch_on_policy_gradient(
        advantage.to(KERNEL_DEVICE), -0.1, 0.2, turned.to(KERNEL_DEVICE), None, 0, turned.shape, torch.float32
    )
    assert_within(kernel, dense, relative=0, of_largest=FLOAT32)
    assert_within(dense, advantage.view(-1, 1, 1) * case.eps * (0.5 / 240), relative=0, of_largest=FLOAT32)


def test_row_bits_do_not_depend_on_the_batch():
    case, advantage = make_case((64, 1, 2049), torch.float32), advantages(64)
    full = on_policy_gradient(advantage, case.b, case.s, case.key, case.v.shape)
    row = slice(41, 42)
    key = NoiseKey(case.key.seed, case.key.words[row])
    assert torch.equal(on_policy_gradient(advantage[row], case.b[row], case.s[row], key, (1, 1, 2049)), full[row])


def test_compiles():
    case, advantage = make_case((3, 5, 20), torch.bfloat16), advantages(3)

    def gradient(advantage, words):
        key = NoiseKey(case.key.seed, words)
        return on_policy_gradient(advantage, case.b, case.s, key, (3, 5, 20), torch.bfloat16)

    compiled = torch.compile(gradient, fullgraph=True)(advantage, case.key.words)
    assert torch.equal(compiled, gradient(advantage, case.key.words))


def test_registration():
    case, advantage = make_case((2, 3, 20), torch.float32), advantages(2)
    operator = torch.ops.fastgrpo_kernels.on_policy_gradient.default
    rows = advantage, case.b, case.s
    torch.library.opcheck(operator, (*rows, None, case.key.words, 5, [2, 3, 20], torch.bfloat16))
    torch.library.opcheck(operator, (*rows, case.eps, None, 0, [2, 3, 20], torch.float32))


def test_runs_under_fake_tensors():
    with FakeTensorMode():
        row, key = torch.rand(4), NoiseKey(3, torch.zeros(4, 3, dtype=torch.int32))
        grad = on_policy_gradient(row, row, row, key, (4, 3, 8), torch.bfloat16)
        assert (grad.shape, grad.dtype) == ((4, 3, 8), torch.bfloat16)
        # The ATen body itself reads no value either.
        assert op.on_policy_gradient_cpu(row, row, 0.1, None, key.words, 3, (4, 3, 8), torch.float32).shape == (4, 3, 8)


def refusals():
    case, advantage = make_case((2, 3, 20), torch.float32), advantages(2)
    b, s, key, shape = case.b, case.s, case.key, (2, 3, 20)
    call: Any = on_policy_gradient
    return [
        (TypeError, lambda: call(1.0, b, s, key, shape), "advantage_weight: expected a "),
        (
            ValueError,
            lambda: on_policy_gradient(advantage[:1], b, s, key, shape),
            "advantage_weight: expected a scalar",
        ),
        (ValueError, lambda: on_policy_gradient(advantage * torch.nan, b, s, key, shape), "advantage_weight: must be"),
        (ValueError, lambda: on_policy_gradient(advantage, b, 0.0, key, shape), "s: must be positive"),
        (ValueError, lambda: on_policy_gradient(advantage, b, s, key, (3, 3, 20)), "shape: has 3 samples"),
        (ValueError, lambda: on_policy_gradient(advantage, b, s, key, (2,)), "shape: expected v's"),
        (ValueError, lambda: on_policy_gradient(advantage, b, s, case.eps, (2, 3, 21)), "noise: expected shape"),
        (TypeError, lambda: on_policy_gradient(advantage, b, s, None, shape), "noise: expected the step's NoiseKey"),
        (TypeError, lambda: on_policy_gradient(advantage, b, s, key, shape, torch.int8), "dtype: expected float32"),
        (
            ValueError,
            lambda: on_policy_gradient(advantage.clone().requires_grad_(), b, s, key, shape),
            "advantage_weight: requires a gradient",
        ),
        (ValueError, lambda: on_policy_backward(case.v, advantage, b, s, key), "v: has no graph"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    error, call, message = refusals()[index]
    with pytest.raises(error, match=message):
        call()
