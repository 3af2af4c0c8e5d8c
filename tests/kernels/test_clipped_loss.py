"""clipped_loss: equal to fastgrpo's objective and to the float64 oracle in value, gradient, statistics; refusals."""

import itertools
from typing import Any

import pytest
import torch
from support.kernel_cases import KERNEL_DEVICE, gradient_of, make_case
from support.objective import SUMMED, policy_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.config import ObjectiveConfig
from fastgrpo_kernels import clipped_loss, shift_moments
from fastgrpo_kernels.clipped_loss import LossStatistics, op
from fastgrpo_kernels.clipped_loss.reference import clipped_loss_reference

CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 2e-3}
FORMS: list[dict[str, Any]] = [
    {"ratio": ratio, "dual_clip": dual, "dppo_threshold": threshold, "kl_weight": kl}
    for ratio, dual, threshold, kl in itertools.product(
        ("gaussian", "unit", "ratio_norm"), (None, 1.001), (None, 1e-3), (0.0, 0.03)
    )
]


def moments(batch, seed=0):
    """P, Q, s, advantage, weight, Q_reference with ratios on both sides of the clip range, ties and paddings."""
    generator = torch.Generator().manual_seed(seed)
    P, A, reference = (torch.randn(batch, generator=generator) for _ in range(3))
    Q, s, weight = (torch.rand(batch, generator=generator) for _ in range(3))
    P, Q, s, weight = P * 3e-3, Q * 4e-3, 0.2 + 0.7 * s, 0.1 + weight
    # On policy; a padding; no advantage.
    P[:1], Q[:1], weight[1:2], A[2:3] = 0, 0, 0, 0
    return P, Q, s, A, weight, reference.abs() * 1e-2


def run_eager(rows, form, **more):
    P, Q, s, A, weight, reference = rows
    leaves = [t.clone().requires_grad_() for t in (P, Q, reference)]
    Q_reference = leaves[2] if form["kl_weight"] else None
    loss, statistics = clipped_loss(leaves[0], leaves[1], s, A, weight, **CLIP, **form, Q_reference=Q_reference, **more)
    loss.backward()
    return loss, statistics, gradients_of(leaves, form)


def gradients_of(leaves, form):
    """Gradients of P, Q and, with a KL term, Q_reference; RatioNorm has none by Q."""
    used = leaves[: 2 + bool(form["kl_weight"])]
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in used]


def run_kernel(rows, form, unit=1.0):
    P, Q, s, A, weight, reference = (t.to(KERNEL_DEVICE) for t in rows)
    objective = op.Objective(**CLIP, **form, unit=unit)
    Q_reference = reference if form["kl_weight"] else None
    loss, statistics, factors = op.launch_clipped_loss(P, Q, s, A, weight, Q_reference, objective)
    return loss.cpu(), LossStatistics(statistics.cpu()), list(factors.cpu().unbind(0))


def run_definition(rows, form):
    P, Q, s, A, weight, reference = rows
    leaves = [t.clone().requires_grad_() for t in (P, Q, reference)]
    config = ObjectiveConfig(**CLIP, **form)
    loss, statistics = policy_loss(
        leaves[0], leaves[1], s, A, weight, config, leaves[2] if form["kl_weight"] else None
    )  # fmt: skip
    loss.backward()
    return loss, statistics, gradients_of(leaves, form)


def close(actual, expected):
    """Four units in the last place; or as much of the terms, of size 1, that cancel in the sum."""
    torch.testing.assert_close(actual.detach(), expected.detach().to(actual.dtype), rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(value) for value in form.values()))
def test_equals_the_objective_and_its_gradient(form):
    rows = moments(37)
    loss, statistics, gradients = run_definition(rows, form)
    runs = [run_eager(rows, form), run_kernel(rows, form)]
    for actual, found, factors in runs:
        torch.testing.assert_close(actual.detach(), loss.detach(), rtol=1e-6, atol=2e-6)
        for name, expected in zip(SUMMED, statistics.sums, strict=True):
            torch.testing.assert_close(getattr(found, name), expected.float(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found.max_deviation, statistics.max_deviation.float(), rtol=0, atol=1.3e-7)
        for factor, expected in zip(factors, gradients, strict=True):
            close(factor, expected)
    assert statistics.sums[SUMMED.index("clipped")] > 0
    assert (statistics.sums[SUMMED.index("dropped")] > 0) == (form["dppo_threshold"] is not None)


@pytest.mark.parametrize("elements", [1, 4097])
@pytest.mark.parametrize("ratio", ["gaussian", "unit", "ratio_norm"])
def test_matches_the_float64_oracle_in_both_conventions(ratio, elements):
    P, Q, s, A, weight, reference = moments(19)
    P, Q, reference = P / elements, Q / elements, reference / elements
    form = {"ratio": ratio, "dual_clip": None, "dppo_threshold": None, "kl_weight": 0.03}
    leaves = [t.double().requires_grad_() for t in (P, Q, reference)]
    expected = clipped_loss_reference(
        *leaves[:2], s.double(), A.double(), weight.double(), **CLIP, **form, Q_reference=leaves[2], elements=elements
    )
    expected.backward()
    rows = (P, Q, s, A, weight, reference)
    summed = run_eager(rows, form, reduction="sum", elements=elements)
    for loss, _, gradients in (summed, run_kernel(rows, form, unit=float(elements))):
        torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=2e-6)
        for gradient, leaf in zip(gradients, gradients_of(leaves, form), strict=True):
            torch.testing.assert_close(gradient.double(), leaf, rtol=1e-6, atol=1e-6 * elements)


def test_a_tie_of_the_dual_clip_gives_half_as_autograd_does():
    one = torch.ones(1)
    form = {"ratio": "gaussian", "dual_clip": 1.5, "dppo_threshold": None, "kl_weight": 0.0}
    P = torch.tensor(1.5).log().view(1)
    rows = (P, torch.zeros(1), one, -one, one, one)
    assert P.exp().item() == 1.5
    _, _, (expected, _) = run_definition(rows, form)
    assert expected.item() == pytest.approx(0.75)
    assert run_eager(rows, form)[2][0] == run_kernel(rows, form)[2][0] == expected


def test_overflow_and_nan_are_seen():
    rows = list(moments(5))
    rows[0] = torch.tensor([200.0, 0.0, 0.0, 0.0, 0.0])
    rows[3] = torch.ones(5)
    form = {"ratio": "gaussian", "dual_clip": None, "dppo_threshold": None, "kl_weight": 0.0}
    for loss, statistics, gradients in (run_eager(rows, form), run_kernel(rows, form)):
        # Clipped: the loss is finite, its gradient zero.
        assert loss.isfinite()
        assert gradients[0][0] == 0
        assert statistics.max_deviation == torch.inf
    rows[0][3] = torch.nan
    for loss, statistics, gradients in (run_eager(rows, form), run_kernel(rows, form)):
        assert loss.isnan()
        assert gradients[0][3].isnan()
        assert statistics.max_deviation.isnan()


def test_float_scale_and_weight_and_a_long_batch():
    P, Q, _, A, *_ = moments(1300)
    form = {"ratio": "unit", "dual_clip": None, "dppo_threshold": None, "kl_weight": 0.0}
    rows = (P, Q, torch.full((1300,), 0.5), A, torch.full((1300,), 1 / 1300), P)
    expected, statistics, gradients = run_definition(rows, form)
    loss, found = clipped_loss(P, Q, 0.5, A, 1 / 1300, **CLIP, ratio="unit")
    close(loss, expected)
    loss, _, factors = run_kernel(rows, form)
    close(loss, expected)
    close(found.ratio, statistics.sums[0])
    for factor, gradient in zip(factors, gradients, strict=True):
        close(factor, gradient)


def test_trains_through_the_shift_moments():
    case = make_case((4, 3, 50), torch.float32, shift=0.02)
    A, weight, form = torch.tensor([1.0, -1.0, 0.5, -2.0]), torch.full((4,), 0.25), FORMS[0]

    def gradient(objective):
        v = case.v.clone().requires_grad_()
        P, Q = shift_moments(v, case.v_old, case.b, case.s, case.key)
        objective(P, Q).backward()
        return gradient_of(v)

    def definition(P, Q):
        return policy_loss(P, Q, case.s.float(), A, weight, ObjectiveConfig(**CLIP, **form))[0]

    expected = gradient(definition)
    assert expected.any()
    actual = gradient(lambda P, Q: clipped_loss(P, Q, case.s, A, weight, **CLIP, **form)[0])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_compiles_with_gradient():
    rows, form = moments(6), FORMS[-1]
    P, Q, s, A, weight, reference = rows
    leaves = [t.clone().requires_grad_() for t in (P, Q, reference)]

    @torch.compile(fullgraph=True)
    def loss(P, Q, Q_reference):
        total, statistics = clipped_loss(P, Q, s, A, weight, **CLIP, **form, Q_reference=Q_reference)
        return total, statistics.kl

    total, kl = loss(*leaves)
    total.backward()
    expected, statistics, gradients = run_eager(rows, form)
    # On a CPU Inductor sees the formula, and has an exponential of its own.
    close(total, expected)
    close(kl, statistics.kl)
    assert not kl.requires_grad
    for found, gradient in zip(gradients_of(leaves, form), gradients, strict=True):
        close(found, gradient)


def test_registration():
    P, Q, s, A, weight, reference = moments(3)
    operator = torch.ops.fastgrpo_kernels.clipped_loss.default
    leaves = [t.requires_grad_() for t in (P, Q, reference)]
    torch.library.opcheck(operator, (*leaves[:2], s, A, weight, reference, "unit", 1e-3, 1e-3, 2.0, 1e-3, 0.1, 1.0))
    torch.library.opcheck(
        operator, (P.detach(), Q.detach(), s, A, weight, None, "gaussian", 0.1, 0.1, None, None, 0, 1)
    )


def test_runs_under_fake_tensors():
    with FakeTensorMode():
        P, Q, row = torch.rand(4, requires_grad=True), torch.rand(4), torch.rand(4)
        loss, statistics = clipped_loss(P, Q, row, row, row, **CLIP)
        loss.backward()
        assert gradient_of(P).shape == (4,)
        assert statistics.clipped.shape == ()
        objective = op.Objective("unit", 1e-3, 1e-3, 2.0, 1e-3, 0.0, 1.0)
        # The ATen body itself reads no value either.
        factors = op.clipped_loss_cpu(P.detach(), Q, row, row, row, Q, objective)[2]
        assert [factor.shape for factor in factors] == [(4,)] * 3


def refusals():
    P, Q, s, A, w, _ = moments(3)

    def call(P: Any = P, Q=Q, s: Any = s, advantages: Any = A, weight=w, **settings):
        return lambda: clipped_loss(P, Q, s, advantages, weight, **{**CLIP, **settings})

    return [
        (ValueError, call(ratio="gauss"), "ratio: unknown form 'gauss'; one of: gaussian, unit, ratio_norm"),
        (ValueError, call(clip_low=-1e-4), "clip_low: must be at least 0"),
        (ValueError, call(clip_high=float("nan")), "clip_high: must be at least 0"),
        (ValueError, call(dual_clip=1.0), "dual_clip: must be greater than 1"),
        (ValueError, call(dppo_threshold=0.0), "dppo_threshold: must be positive"),
        (ValueError, call(kl_weight=-0.1), "kl_weight: must be at least 0"),
        (ValueError, call(kl_weight=0.1), "kl_weight: needs Q_reference"),
        (TypeError, call(clip_low=torch.ones(2)), "clip_low: expected a number, got Tensor"),
        (TypeError, call(clip_high=None), "clip_high: expected a number, got NoneType"),
        (TypeError, call(kl_weight="0"), "kl_weight: expected a number, got str"),
        (TypeError, call(dual_clip=[2.0]), "dual_clip: expected a number, got list"),
        (TypeError, call(reduction="sum", elements=float("nan")), "elements: expected an integer, got float"),
        (ValueError, call(reduction="sum", elements=0), "elements: must be in"),
        (ValueError, call(reduction="none"), "reduction: expected 'mean' or 'sum'"),
        (ValueError, call(reduction="sum"), "elements: reduction 'sum' needs"),
        (TypeError, call(P=0.1), "P: expected a tensor"),
        (ValueError, call(P=P[:0]), "P: expected non-empty"),
        (TypeError, call(Q=Q.double()), "Q: expected float32"),
        (ValueError, call(Q=Q[:2]), r"Q: expected \[3\] on cpu"),
        (TypeError, call(Q_reference=1.0), "Q_reference: expected float32"),
        (TypeError, call(advantages=1.0), "advantages: expected a"),
        (ValueError, call(advantages=A * torch.nan), "advantages: must be finite"),
        (ValueError, call(weight=w[:2]), "weight: expected a scalar or shape"),
        (ValueError, call(s=0.0), "s: must be positive"),
        (ValueError, call(advantages=A.clone().requires_grad_()), "advantages: requires a gradient"),
    ]


@pytest.mark.parametrize("index", range(len(refusals())), ids=[message for *_, message in refusals()])
def test_refuses(index):
    error, call, message = refusals()[index]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("path", ["eager", "operator"])
def test_refuses_double_backward(path):
    P, Q, s, A, weight, _ = moments(3)
    P.requires_grad_()
    if path == "eager":
        loss = clipped_loss(P, Q, s, A, weight, **CLIP)[0]
    else:
        arguments = P, Q, s, A, weight, None, "gaussian", 1e-3, 2e-3, None, None, 0.0, 1.0
        loss = torch.ops.fastgrpo_kernels.clipped_loss(*arguments)[0]
    with pytest.raises(ValueError, match="clipped_loss: has no double backward"):
        torch.autograd.grad(loss, P, create_graph=True)
