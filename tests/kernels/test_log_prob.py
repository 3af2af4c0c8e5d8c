"""log_prob: value and gradient against the float64 oracle, bits, registration, refusals."""

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, SHAPES, ULP, assert_within, gradient_of, make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import gaussian_step, log_prob, shift_moments
from fastgrpo_kernels.log_prob import op
from fastgrpo_kernels.log_prob.reference import log_prob_reference

# Of the value alone, and of what cancels in (y - x) - (a - 1)·x - b·v: products and sums rounded to float32.
VALUE, ROUNDING = 3e-7, 1.5e-7
# Of the largest.
GRADIENT = 1e-6


def inputs(shape, dtype, y_dtype=torch.float32):
    """(x, v, y, a, b, s) whose y is a step taken with another v, and stored."""
    case = make_case(shape, dtype)
    y = gaussian_step(case.x, case.v_old, case.a, case.b, case.s, case.eps, out_dtype=y_dtype)
    return case.x, case.v, y, case.a, case.b, case.s


def oracle(arguments, grad):
    """(value, its gradient, the terms of the residual in units of s) in float64."""
    x, v, y, *coefficients = (t.double() for t in arguments)
    v.requires_grad_()
    value = log_prob_reference(x, v, y, *coefficients)
    value.backward(grad.double())
    a, b, s = (c.view(-1, *[1] * (x.ndim - 1)) for c in coefficients)
    return value.detach(), v.grad, ((y - x).abs() + ((a - 1) * x).abs() + (b * v.detach()).abs()) / s


def as_kernel_takes(arguments):
    """On the device, with a - 1 in place of a."""
    x, v, y, a, b, s = arguments
    return [t.to(KERNEL_DEVICE) for t in (x, v, y, a - 1, b, s)]


def check(arguments, value, grad_v, grad):
    expected, expected_grad, terms = oracle(arguments, grad)
    s, b, elements = arguments[5], arguments[4], arguments[0][0].numel()
    factor = (grad * b / (s * elements)).view(-1, *[1] * (terms.ndim - 1)).abs()
    # expected_grad = ± factor·z
    z = expected_grad.abs() / factor
    assert value.dtype == torch.float32
    bound = VALUE * expected.abs().clamp_min(1) + ROUNDING * (z * terms).flatten(1).mean(1)
    assert ((value.detach().cpu().double() - expected).abs() <= bound).all()
    dtype = arguments[1].dtype
    assert grad_v.dtype == dtype
    # The smallest float16 is 6e-8: gradients below it are lost.
    floor = 6e-8 / float(expected_grad.abs().max()) if dtype == torch.float16 else 0
    relative = 0 if dtype == torch.float32 else ULP[dtype]
    assert_within(grad_v, expected_grad, relative=relative, of_largest=GRADIENT + floor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_path_and_kernels_match_the_oracle(shape, dtype):
    arguments = inputs(shape, dtype, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    grad = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    v = arguments[1].clone().requires_grad_()
    value = log_prob(arguments[0], v, *arguments[2:])
    value.backward(grad)
    check(arguments, value, v.grad, grad)
    on_device = as_kernel_takes(arguments)
    kernel_grad = op.launch_log_prob_backward(grad.to(KERNEL_DEVICE), *on_device)
    check(arguments, op.launch_log_prob(*on_device), kernel_grad, grad)


def test_float_coefficients_and_strided_inputs():
    x, v, y, *_ = inputs((3, 6, 40), torch.bfloat16)
    dense = log_prob(x, v, y, 1.02, -0.1, 0.2)
    expected = log_prob_reference(x, v, y, 1.02, -0.1, 0.2)
    assert_within(dense, expected, relative=0, of_largest=2e-6)
    wide, turned = torch.cat([v, v], dim=1)[:, :6], y.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(log_prob(x, wide, turned, 1.02, -0.1, 0.2), dense)
    moved = (t.to(KERNEL_DEVICE) for t in (x, wide, turned))
    kernel = op.launch_log_prob(*moved, a_less_one=0.02, b=-0.1, s=0.2)
    assert_within(kernel, expected, relative=0, of_largest=2e-6)


def test_difference_is_the_log_ratio_of_the_shift_moments():
    case = make_case((3, 4, 10, 25), torch.float32)
    y = gaussian_step(case.x, case.v_old, case.a, case.b, case.s, case.eps)
    new, old = (log_prob(case.x, v, y, case.a, case.b, case.s) for v in (case.v, case.v_old))
    p, q = shift_moments(case.v, case.v_old, case.b, case.s, case.eps)
    assert (p - q / 2).abs().min() > 1e-4
    torch.testing.assert_close(new - old, p - q / 2, rtol=0, atol=1e-6)


def test_row_bits_do_not_depend_on_the_batch():
    arguments = inputs((64, 2, 2049), torch.bfloat16)
    full = log_prob(*arguments)
    assert torch.equal(log_prob(*arguments), full)
    assert torch.equal(log_prob(*(t[41:42] for t in arguments)), full[41:42])


def test_compiles_with_gradient():
    x, v, y, a, b, s = inputs((3, 5, 20), torch.bfloat16)
    weight = torch.tensor([1.0, -2.0, 0.5])
    compiled, eager = v.clone().requires_grad_(), v.clone().requires_grad_()

    def loss(v):
        return (log_prob(x, v, y, a, b, s) * weight).sum()

    torch.compile(loss, fullgraph=True)(compiled).backward()
    loss(eager).backward()
    assert torch.equal(gradient_of(compiled), gradient_of(eager))


def test_registration():
    x, v, y, *coefficients = inputs((2, 3, 20), torch.bfloat16)
    arguments = x, v.requires_grad_(), y, *coefficients
    torch.library.opcheck(torch.ops.fastgrpo_kernels.log_prob.default, arguments)
    backward = torch.ops.fastgrpo_kernels.log_prob_backward.default
    torch.library.opcheck(backward, (torch.ones(2), x, v.detach(), y, *coefficients))


def test_runs_under_fake_tensors():
    with FakeTensorMode():
        v = torch.randn(4, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        x, y, row = torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.rand(4, dtype=torch.float64)
        log_prob(x, v, y, row, row, row).sum().backward()
        assert (gradient_of(v).shape, gradient_of(v).dtype) == (v.shape, v.dtype)
        # The ATen bodies themselves read no value either.
        value = op.log_prob_cpu(x, v.detach(), y, row, row, row)
        assert op.log_prob_backward_cpu(value, x, v.detach(), y, row, row, row).shape == v.shape


def refusals():
    x, v, y, a, b, s = inputs((2, 3, 20), torch.float32)
    call: Any = log_prob
    return [
        (TypeError, lambda: log_prob(x.double(), v, y, a, b, s), "x: expected float32"),
        (ValueError, lambda: log_prob(x, v[:1], y, a, b, s), "v: expected shape"),
        (ValueError, lambda: log_prob(x, v, y[:, :1], a, b, s), "y: expected shape"),
        (TypeError, lambda: call(x, v, None, a, b, s), "y: expected a tensor"),
        (ValueError, lambda: log_prob(x, v, y, a * float("nan"), b, s), "a: must be finite"),
        (ValueError, lambda: log_prob(x, v, y, a, b, 0.0), "s: must be positive"),
        (ValueError, lambda: log_prob(x, v, y, a, b, -s), "s: must be positive"),
        (ValueError, lambda: log_prob(x.clone().requires_grad_(), v, y, a, b, s), "x: requires a gradient"),
        (ValueError, lambda: log_prob(x, v, y.clone().requires_grad_(), a, b, s), "y: requires a gradient"),
        (ValueError, lambda: log_prob(x, v, y, a, b.clone().requires_grad_(), s), "b: requires a gradient"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    error, call, message = refusals()[index]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("path", ["eager", "operator"])
def test_refuses_double_backward(path):
    x, v, y, *coefficients = inputs((2, 3, 20), torch.float32)
    function = log_prob if path == "eager" else torch.ops.fastgrpo_kernels.log_prob
    value = function(x, v.requires_grad_(), y, *coefficients)
    with pytest.raises(ValueError, match="log_prob: has no double backward"):
        torch.autograd.grad(value.sum(), v, create_graph=True)


def test_without_a_deviation_it_is_the_negative_squared_error():
    """As CPS trainers have it: no factor, no constant, on both paths, in value and gradient."""
    x, v, y = (torch.randn(3, 5, 700, generator=torch.Generator().manual_seed(i)) for i in range(3))
    a_less_one, b, grad = torch.tensor([0.02, -0.01, 0.0]), torch.tensor([-0.1, -0.2, -0.3]), torch.ones(3)
    leaf = v.double().requires_grad_()
    column = (-1, 1, 1)
    error = y.double() - (1 + a_less_one.double()).view(column) * x.double() - b.double().view(column) * leaf
    expected = -error.square().mean((1, 2))
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    arguments = x, v, y, a_less_one, b, None
    moved: Any = [t if t is None else t.to(KERNEL_DEVICE) for t in arguments]
    for value, gradient in (
        (op.log_prob_cpu(*arguments), op.log_prob_backward_cpu(grad, *arguments)),
        (op.launch_log_prob(*moved), op.launch_log_prob_backward(grad.to(KERNEL_DEVICE), *moved)),
    ):
        torch.testing.assert_close(value.cpu().double(), expected.detach(), rtol=1e-6, atol=0)
        assert (gradient.cpu().double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
