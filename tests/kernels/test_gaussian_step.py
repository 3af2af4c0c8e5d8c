"""gaussian_step: CPU path and Triton kernel against the float64 oracle, gradient, registration, refusals."""

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, KERNEL_DEVICE, SHAPES, ULP, assert_within, gradient_of, make_case, on_device
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import NoiseKey, gaussian_step
from fastgrpo_kernels.gaussian_step import paths
from fastgrpo_kernels.gaussian_step.reference import gaussian_step_reference

# Three float32 products and sums of terms no larger than the largest value; coefficients rounded to float32.
FLOAT32 = 4e-7


def kernel_arguments(case, eps, words, out_dtype):
    return on_device(paths.Step(case.x, case.v, case.a, case.b, case.s, eps, words, case.key.seed, out_dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explicit", [False, True])
def test_cpu_path_and_kernel_match_the_oracle(shape, dtype, explicit):
    case = make_case(shape, dtype)
    expected = gaussian_step_reference(case.x, case.v, case.a, case.b, case.s, case.eps)
    noise = case.eps if explicit else case.key
    y = gaussian_step(case.x, case.v, case.a, case.b, case.s, noise)
    assert y.dtype == torch.float32
    assert_within(y, expected, relative=0, of_largest=FLOAT32)
    eps, words = (case.eps, None) if explicit else (None, case.key.words)
    kernel, *_ = paths.launch_gaussian_step(kernel_arguments(case, eps, words, torch.float32))
    assert_within(kernel, expected, relative=0, of_largest=FLOAT32 + 1e-6 * (not explicit))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stores_in_the_dtype_of_x_or_the_one_asked_for(dtype):
    case = make_case((2, 3, 50), torch.float32)
    x = case.x.to(dtype)
    y = gaussian_step(x, case.v, case.a, case.b, case.s, case.key)
    assert y.dtype == dtype
    expected = gaussian_step_reference(x, case.v, case.a, case.b, case.s, case.eps)
    assert_within(y, expected, relative=ULP[dtype], of_largest=FLOAT32)
    asked = gaussian_step(x, case.v, case.a, case.b, case.s, case.key, out_dtype=torch.bfloat16)
    assert asked.dtype == torch.bfloat16
    kernel, *_ = paths.launch_gaussian_step(kernel_arguments(case, None, case.key.words, torch.bfloat16))
    assert_within(
        kernel, gaussian_step_reference(*case[:2], *case[3:6], case.eps), relative=ULP[torch.bfloat16], of_largest=1e-6
    )


def test_floats_none_and_strided_inputs():
    case = make_case((3, 6, 40), torch.float32)
    y = gaussian_step(case.x, case.v, 1.0, -0.1, 0.0, None)
    assert_within(y, case.x.double() - 0.1 * case.v.double(), relative=0, of_largest=FLOAT32)
    kernel, *_ = paths.launch_gaussian_step(
        paths.Step(case.x.to(KERNEL_DEVICE), case.v.to(KERNEL_DEVICE), 1.0, -0.1, 0.0, None, None, 0, torch.float32)
    )
    assert_within(kernel, y, relative=0, of_largest=FLOAT32)
    dense = gaussian_step(case.x, case.v, case.a, case.b, case.s, case.key)
    # A batch slice of a larger output, and a transposed layout.
    wide = torch.cat([case.v, case.v], dim=1)[:, :6]
    turned = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gaussian_step(turned, wide, case.a, case.b, case.s, case.key), dense)
    step = paths.Step(turned, wide, case.a, case.b, case.s, None, case.key.words, case.key.seed, torch.float32)
    strided, *_ = paths.launch_gaussian_step(on_device(step))
    assert_within(strided, dense, relative=0, of_largest=1e-6)


def test_row_bits_do_not_depend_on_the_batch():
    case = make_case((64, 2, 2049), torch.bfloat16)
    full = gaussian_step(case.x, case.v, case.a, case.b, case.s, case.key)
    assert torch.equal(gaussian_step(case.x, case.v, case.a, case.b, case.s, case.key), full)
    row = slice(41, 42)
    key = NoiseKey(case.key.seed, case.key.words[row])
    alone = gaussian_step(case.x[row], case.v[row], case.a[row], case.b[row], case.s[row], key)
    assert torch.equal(alone, full[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_is_the_coefficient(dtype, compiled):
    case = make_case((3, 5, 20), dtype)
    x, v = case.x.clone().requires_grad_(), case.v.clone().requires_grad_()
    weight = torch.randn(case.x.shape)

    def loss(x, v):
        return (gaussian_step(x, v, case.a, case.b, case.s, case.key) * weight).sum()

    (torch.compile(loss, fullgraph=True) if compiled else loss)(x, v).backward()
    column = (-1, 1, 1)
    assert gradient_of(v).dtype == dtype
    assert_within(gradient_of(x), case.a.view(column) * weight, relative=0, of_largest=FLOAT32)
    assert_within(gradient_of(v), case.b.view(column) * weight, relative=ULP[dtype], of_largest=FLOAT32)


def test_registration():
    case = make_case((2, 3, 20), torch.bfloat16)
    x, v = case.x.clone().requires_grad_(), case.v.clone().requires_grad_()
    coefficients = (case.a, case.b, case.s)
    operator = torch.ops.fastgrpo_kernels.gaussian_step.default
    torch.library.opcheck(operator, (x, v, *coefficients, None, case.key.words, 5, torch.bfloat16))
    torch.library.opcheck(operator, (case.x, case.v, *coefficients, case.eps, None, 0, torch.float32))


def test_runs_under_fake_tensors():
    with FakeTensorMode():
        x, v, row = torch.randn(4, 3, 8), torch.randn(4, 3, 8, dtype=torch.bfloat16), torch.rand(4)
        key = NoiseKey(3, torch.zeros(4, 3, dtype=torch.int32))
        y = gaussian_step(x, v, row, row, row, key)
        assert (y.shape, y.dtype) == (x.shape, torch.float32)
        assert gaussian_step(x, v, 1.0, -0.1, 0.0, None, out_dtype=torch.bfloat16).dtype == torch.bfloat16
        # The ATen body itself reads no value either.
        step = paths.Step(x, v, row, row, row, None, key.words, 3, torch.float32, v, row, row, row, True, True)
        assert [t.shape for t in paths.gaussian_step_cpu(step)] == [x.shape, (4,), x.shape, v.shape]


def refusals():
    case = make_case((2, 3, 20), torch.float32)
    x, v, key, abs_ = case.x, case.v, case.key, (case.a, case.b, case.s)
    # Types that it does not have, too.
    call: Any = gaussian_step
    return [
        (TypeError, lambda: call([1.0], v, *abs_, key), "x: expected a tensor"),
        (TypeError, lambda: gaussian_step(x.double(), v, *abs_, key), "x: expected float32"),
        (ValueError, lambda: gaussian_step(x[:, 0, 0], v, *abs_, key), "x: expected .* 2 to 5 dimensions"),
        (ValueError, lambda: gaussian_step(x[:0], v[:0], *abs_, key), "x: has no elements"),
        (ValueError, lambda: gaussian_step(x, v[:, :2], *abs_, key), r"v: expected shape \[2, 3, 20\]"),
        (ValueError, lambda: gaussian_step(x, v, case.a[:1], case.b, case.s, key), "a: expected a scalar or shape"),
        (TypeError, lambda: gaussian_step(x, v, case.a.half(), case.b, case.s, key), "a: expected float64 or float32"),
        (TypeError, lambda: call(x, v, None, case.b, case.s, key), "a: expected a float or a"),
        (ValueError, lambda: gaussian_step(x, v, 1.0, float("nan"), 0.1, key), "b: must be finite"),
        (ValueError, lambda: gaussian_step(x, v, 1.0, 1.0, case.s * float("inf"), key), "s: must be finite"),
        (ValueError, lambda: gaussian_step(x, v, 1.0, 1.0, 0.1, None), "noise: s = 0.1 needs noise"),
        (ValueError, lambda: gaussian_step(x, v, *abs_, case.eps[:1]), "noise: expected shape"),
        (ValueError, lambda: gaussian_step(x, v, *abs_, NoiseKey(0, key.words[:1])), "noise: key has 1 rows"),
        (TypeError, lambda: call(x, v, *abs_, 3), "noise: expected a tensor"),
        (TypeError, lambda: gaussian_step(x, v, *abs_, key, out_dtype=torch.int8), "out_dtype: expected"),
        (ValueError, lambda: gaussian_step(x, v, case.a.clone().requires_grad_(), 1.0, 0.1, key), "a: requires a grad"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    error, call, message = refusals()[index]
    with pytest.raises(error, match=message):
        call()


def test_refuses_a_tensor_s_without_noise():
    case = make_case((2, 3, 20), torch.float32)
    with pytest.raises(ValueError, match="noise: s is not 0"):
        gaussian_step(case.x, case.v, case.a, case.b, case.s, None)
    zero = torch.zeros_like(case.s)
    assert gaussian_step(case.x, case.v, case.a, case.b, zero, None).shape == case.x.shape


@pytest.mark.parametrize("path", ["eager", "operator"])
def test_refuses_double_backward(path):
    case = make_case((2, 3, 20), torch.float32)
    v = case.v.clone().requires_grad_()
    rows = case.x, v, case.a, case.b, case.s
    if path == "eager":
        y = gaussian_step(*rows, case.key)
    else:
        y = torch.ops.fastgrpo_kernels.gaussian_step(*rows, None, case.key.words, 5, torch.float32)[0]
    with pytest.raises(ValueError, match="no double backward"):
        torch.autograd.grad(y.square().sum(), v, create_graph=True)
