"""What a trainer hands to the loss: several advantages, padding, masks, tables, log-ratios; and what it launches."""

import itertools
from typing import Any

import pytest
import torch
from support.kernel_cases import KERNEL_DEVICE, gradient_of, make_case, modules_with, on_device
from support.launches import aten, counting, triton

from fastgrpo_kernels import (
    StoredStep,
    clipped_loss,
    gaussian_step,
    grpo_loss,
    log_prob,
    shift_moments,
)
from fastgrpo_kernels.clipped_loss import FIELDS, LossStatistics
from fastgrpo_kernels.clipped_loss.reference import clipped_loss_reference
from fastgrpo_kernels.shift_moments.reference import shift_moments_reference

CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 2e-3}
FORMS: dict[str, Any] = {"dual_clip": 1.5, "dppo_threshold": 1e-4}
SHAPE = (4, 3, 5, 140)


@pytest.fixture(params=["cpu", "launch"])
def path(request, monkeypatch):
    """The ATen path, and Triton's in its interpreter; with a GPU, that."""
    if request.param == "launch":
        for module in modules_with("launches"):
            monkeypatch.setattr(module, "launches", lambda tensor: True)
    return KERNEL_DEVICE if request.param == "launch" else "cpu"


def inputs(device, dtype=torch.float32):
    return on_device(make_case(SHAPE, dtype), device)


def close(actual, expected, scale=1.0):
    expected = expected.detach().double().cpu()
    torch.testing.assert_close(actual.detach().double().cpu(), expected, rtol=2e-6, atol=2e-6 * scale)


def oracle(case, advantages, weight, mask=None, reference=None, **settings):
    """(losses [B], gradient of their sum by v) in float64, a sample and an advantage at a time."""
    v = case.v.double().cpu().requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask.expand(SHAPE)
    losses = []
    for i in range(len(v)):
        chosen = [t[i].cpu()[mask[i]][None] for t in (v, case.v_old, case.eps)]
        P, Q = shift_moments_reference(chosen[0], chosen[1], case.b[i].cpu(), case.s[i].cpu(), chosen[2])
        R = None
        if reference is not None:
            other = reference[i].cpu()[mask[i]][None]
            R = shift_moments_reference(chosen[0], other, case.b[i].cpu(), case.s[i].cpu(), chosen[2])[1]
        total = 0.0
        for k, advantage in enumerate(advantages[i].double().cpu().reshape(-1)):
            more = {**settings, "Q_reference": R} if k == 0 else {**settings, "kl_weight": 0.0}
            row = case.s[i : i + 1].cpu(), advantage[None], weight[i : i + 1].double().cpu()
            total = total + clipped_loss_reference(P, Q, *row, **CLIP, **more)
        losses.append(total)
    losses = torch.stack(losses)
    (gradient,) = torch.autograd.grad(losses.sum(), v)
    return losses, gradient


ADVANTAGES = torch.tensor([[1.0, -0.4], [-0.7, 0.9], [0.4, 0.3], [-1.5, -0.2]])
WEIGHT = torch.tensor([0.3, 0.2, 0.4, 0.1])


@pytest.mark.parametrize("ratio", ["gaussian", "unit", "ratio_norm"])
def test_several_advantages_a_sample_are_as_many_losses_summed(path, ratio):
    case = inputs(path)
    v = case.v.clone().requires_grad_()
    more = {"ratio": ratio, "kl_weight": 0.1, **FORMS}
    reference = case.v_old.flip(2)
    loss, found = grpo_loss(
        v, case.v_old, case.b, case.s, case.key, ADVANTAGES.to(path), WEIGHT.to(path), **CLIP, **more,
        v_reference=reference,
    )  # fmt: skip
    loss.backward()
    losses, gradient = oracle(case, ADVANTAGES, WEIGHT, reference=reference, **more)
    close(loss, losses.sum())
    close(v.grad / gradient.abs().max().to(path), gradient / gradient.abs().max())
    close(found.loss, losses.sum())
    one = [
        grpo_loss(case.v, case.v_old, case.b, case.s, case.key, a, WEIGHT.to(path), **CLIP, ratio=ratio, **FORMS)[1]
        for a in ADVANTAGES.to(path).unbind(1)
    ]
    for name in ("clipped", "dropped"):
        close(getattr(found, name), sum(getattr(s, name) for s in one) / 2)
    assert found.clipped > 0 or ratio != "gaussian"


@pytest.mark.parametrize("ratio", ["unit", "ratio_norm"])
def test_a_step_of_one_deviation_for_all_has_the_gradient_of_rows(path, ratio):
    """s as a number and as a row: the factor that is the log-ratio's derivative is in both."""
    case = inputs(path)
    gradients = []
    for s in (0.3, torch.full((4,), 0.3, device=path)):
        v = case.v.clone().requires_grad_()
        arguments = case.v_old, 0.1, s, case.eps, ADVANTAGES[:, 0].to(path), WEIGHT.to(path)
        grpo_loss(v, *arguments, **CLIP, ratio=ratio)[0].backward()
        gradients.append(v.grad)
    close(gradients[0] / gradients[1].abs().max(), gradients[1] / gradients[1].abs().max())


def test_losses_of_each_sample_and_their_gradient(path):
    case = inputs(path)
    v = case.v.clone().requires_grad_()
    arguments = case.v_old, case.b, case.s, case.eps, ADVANTAGES[:, 0].to(path), WEIGHT.to(path)
    losses, found = grpo_loss(v, *arguments, **CLIP, **FORMS, per_sample=True)
    expected, _ = oracle(case, ADVANTAGES[:, :1], WEIGHT, **FORMS)
    close(losses, expected)
    close(found.loss, expected.sum())
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0], device=path)
    (losses * factors).sum().backward()
    _, gradient = oracle(case, ADVANTAGES[:, :1], WEIGHT * factors.cpu(), **FORMS)
    close(v.grad / gradient.abs().max().to(path), gradient / gradient.abs().max())
    # An expanded gradient, as sum() hands it down.
    v.grad = None
    grpo_loss(v, *arguments, **CLIP, **FORMS, per_sample=True)[0].sum().backward()
    summed = gradient_of(v)
    v.grad = None
    grpo_loss(v, *arguments, **CLIP, **FORMS)[0].backward()
    assert torch.equal(summed, gradient_of(v))


def test_padding_has_no_part_whatever_it_is(path):
    case = inputs(path)
    weight = torch.tensor([0.3, 0.0, 0.4, 0.0], device=path)
    advantages = ADVANTAGES.to(path)
    filled, clean = case.v.clone(), case.v.clone()
    filled[1], clean[1] = torch.nan, case.v_old[1]
    results = []
    for v in (filled, clean):
        arguments = v, case.v_old, case.b, case.s, case.eps, advantages, weight
        results.append(grpo_loss(*arguments, **CLIP))
    assert results[0][0].isfinite()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].values, results[1][1].values)
    assert results[0][1].weight == weight.sum()


MASKS = {
    "elements": lambda g: torch.rand(SHAPE, generator=g) > 0.4,
    "tokens": lambda g: torch.rand(SHAPE[:3], generator=g) > 0.4,
    "channels for all": lambda g: torch.tensor([True, False, True]).view(1, 3, 1, 1),
    "last dimension": lambda g: torch.rand((4, 1, 1, 140), generator=g) > 0.4,
    "middle": lambda g: torch.tensor([True, True, False, True, False]).view(1, 1, 5, 1).expand(4, -1, -1, -1),
    "first and last": lambda g: torch.rand((4, 3, 1, 140), generator=g) > 0.4,
}


# Noise from a key, which the interpreter takes seconds for, meets one mask in every run of the tests.
@pytest.mark.parametrize(
    "shape, noise",
    [
        pytest.param(shape, noise, marks=pytest.mark.full) if noise == "key" and shape != "elements" else (shape, noise)
        for shape, noise in itertools.product(MASKS, ("key", "eps", "step"))
    ],
)
def test_means_over_a_mask(path, shape, noise):
    case = inputs(path)
    mask = MASKS[shape](torch.Generator().manual_seed(3))
    whole = mask.view(*mask.shape, *[1] * (4 - mask.ndim)).expand(SHAPE)
    y = gaussian_step(case.x, case.v_old, case.a, case.b, case.s, case.eps)
    # What is masked is not read.
    dirty = [torch.where(whole.to(path), t, torch.nan) for t in (case.v, case.v_old, case.v_old.flip(2), case.eps, y)]
    v = dirty[0].requires_grad_()
    given = {"key": case.key, "eps": dirty[3], "step": StoredStep(case.x, dirty[4], case.a)}[noise]
    arguments = v, dirty[1], case.b, case.s, given
    settings = {"kl_weight": 0.1, **FORMS}
    loss, found = grpo_loss(
        *arguments, ADVANTAGES.to(path), WEIGHT.to(path), **CLIP, **settings, v_reference=dirty[2], mask=mask.to(path)
    )
    loss.backward()
    losses, gradient = oracle(case, ADVANTAGES, WEIGHT, whole, case.v_old.flip(2), **settings)
    close(loss, losses.sum(), 5)
    assert not gradient_of(v)[~whole.to(path)].any()
    # A stored step's noise is known to the rounding of what was stored.
    close(v.grad / gradient.abs().max().to(path), gradient / gradient.abs().max(), 5)
    fused, v.grad = v.grad, None
    P, Q = shift_moments(*arguments, mask=mask.to(path))
    reference = shift_moments(v, dirty[2], *arguments[2:4], case.key, mask=mask.to(path))[1]
    more = {**CLIP, **settings, "Q_reference": reference}
    other, statistics = clipped_loss(P, Q, case.s, ADVANTAGES.to(path), WEIGHT.to(path), **more)
    other.backward()
    close(other, loss.detach())
    close(statistics.values, found.values)
    close(v.grad / gradient.abs().max().to(path), fused / gradient.abs().max().to(path), 2)


def test_an_empty_mask_and_sums_over_one(path):
    case = inputs(path)
    mask = torch.zeros(SHAPE[:2], dtype=torch.bool)
    mask[1:] = True
    P, Q = shift_moments(case.v, case.v_old, case.b, case.s, case.key, mask=mask.to(path))
    assert P[0] == Q[0] == 0
    assert Q[1:].all()
    mask[:, 1:] = False
    arguments = case.b, case.s, case.eps, ADVANTAGES.to(path), WEIGHT.to(path)
    wide = {"clip_low": 0.5, "clip_high": 0.5, "reduction": "sum"}
    found, _ = grpo_loss(case.v, case.v_old, *arguments, **wide, mask=mask.to(path))
    # A sum over the mask is the sum over all where nothing has changed outside of it.
    still = torch.where(mask[..., None, None].to(path), case.v, case.v_old)
    expected, _ = grpo_loss(still, case.v_old, *arguments, **wide)
    close(found, expected)


def test_refuses_masks_that_do_not_fit():
    case = inputs("cpu")
    call = lambda mask: shift_moments(case.v, case.v_old, case.b, case.s, case.key, mask=mask)  # noqa: E731
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        call(torch.ones(SHAPE))
    with pytest.raises(ValueError, match="mask: expected the latents' shape"):
        call(torch.ones(4, 3, 5, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected the latents' shape"):
        call(torch.ones(5, 140, dtype=torch.bool))


@pytest.mark.parametrize("form", [{}, {"ratio": "unit"}, {"ratio": "ratio_norm"}], ids=str)
def test_a_log_ratio_takes_the_place_of_the_moments(path, form):
    generator = torch.Generator().manual_seed(0)
    given = (3e-3 * torch.randn(4, generator=generator)).to(path).requires_grad_()
    s = torch.tensor([0.5, 0.6, 0.7, 0.8], device=path)
    rows = s, ADVANTAGES.to(path), WEIGHT.to(path)
    loss, found = clipped_loss(None, None, *rows, log_ratio=given, **CLIP, **form)
    (gradient,) = torch.autograd.grad(loss, given)
    expected, statistics = clipped_loss(given, torch.zeros(4, device=path), *rows, **CLIP, **form)
    assert torch.equal(loss, expected)
    assert torch.equal(found.values, statistics.values)
    assert torch.equal(gradient, torch.autograd.grad(expected, given)[0])
    assert gradient.any()
    with pytest.raises(TypeError, match="log_ratio: takes the place of P and Q"):
        clipped_loss(given, None, *rows, log_ratio=given, **CLIP)
    if not form:
        # The Gaussian ratio asks for no deviation.
        bare, _ = clipped_loss(log_ratio=given, advantages=rows[1], weight=rows[2], **CLIP)
        assert torch.equal(bare, loss)
    else:
        with pytest.raises(TypeError, match=f"s: ratio '{form['ratio']}' needs"):
            clipped_loss(log_ratio=given, advantages=rows[1], weight=rows[2], **CLIP, **form)


def test_the_rollouts_output_in_another_dtype(path):
    case = inputs(path, torch.bfloat16)
    v_old = case.v_old.float() + 1e-3
    v = case.v.clone().requires_grad_()
    loss, _ = grpo_loss(v, v_old, case.b, case.s, case.key, ADVANTAGES.to(path), WEIGHT.to(path), **CLIP)
    loss.backward()
    assert gradient_of(v).dtype == torch.bfloat16
    losses, gradient = oracle(case._replace(v_old=v_old), ADVANTAGES, WEIGHT)
    close(loss, losses.sum())
    assert (gradient_of(v).double().cpu() - gradient).abs().max() <= 2**-7 * gradient.abs().max()


def test_columns_of_a_table_are_read_where_they_are(path):
    """One gather of (a - 1, b, s, advantages) a micro-batch, and no copy of a column."""
    case = inputs(path)
    table = torch.stack([case.a - 1, case.b, case.s, *ADVANTAGES.to(path).unbind(1)], dim=1).float()
    rows = torch.tensor([2, 0, 3, 1], device=path)
    picked = [t.index_select(0, rows) for t in (case.x, case.v, case.v_old, case.eps)]
    x, v, v_old, eps = picked
    less_one, b, s, advantages = *table.index_select(0, rows)[:, :3].unbind(1), table.index_select(0, rows)[:, 3:]
    assert b.stride(0) == 5
    y = gaussian_step(x, v_old, less_one + 1, b, s, eps)
    found = grpo_loss(v, v_old, b, s, StoredStep(x, y, a_less_one=less_one), advantages, 0.25, **CLIP)
    dense = [t.contiguous() for t in (less_one, b, s, advantages)]
    expected = grpo_loss(v, v_old, dense[1], dense[2], StoredStep(x, y, a_less_one=dense[0]), dense[3], 0.25, **CLIP)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].values, expected[1].values)
    assert torch.equal(
        log_prob(x, v, y, None, b, s, a_less_one=less_one), log_prob(x, v, y, None, *dense[1:3], a_less_one=dense[0])
    )
    near = log_prob(x, v, y, less_one + 1, b, s)
    torch.testing.assert_close(near, log_prob(x, v, y, None, b, s, a_less_one=less_one), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="a: expected either a or a_less_one"):
        log_prob(x, v, y, 1.0, b, s, a_less_one=less_one)
    with pytest.raises(TypeError, match=r"noise\.a: expected either"):
        shift_moments(v, v_old, b, s, StoredStep(x, y))


def test_statistics_add_up():
    case = inputs("cpu")
    parts, kept = (slice(0, 1), slice(1, 4)), []
    whole = None
    for rows in (*parts, slice(0, 4)):
        arguments = case.v[rows], case.v_old[rows], case.b[rows], case.s[rows], case.eps[rows]
        found = grpo_loss(*arguments, ADVANTAGES[rows], WEIGHT[rows], **CLIP, **FORMS)[1]
        if rows == slice(0, 4):
            whole = found
        else:
            kept.append(found.values)
    total = LossStatistics.total(kept)
    assert total.values.dtype == torch.float64
    for name in FIELDS:
        torch.testing.assert_close(getattr(total, name).float(), getattr(whole, name), rtol=1e-6, atol=1e-7, msg=name)
    assert len(FIELDS) == len(total.values)


@pytest.mark.parametrize("kind", ["key", "eps", "step", "everything", "float64"])
def test_launches_of_a_training_loss(kind):
    """On the meta device: one kernel forward, one backward, and what autograd starts from."""
    case = inputs("meta")
    table = torch.empty(4, 7, device="meta")
    less_one, b, s, weight = table[:, :4].unbind(1)
    v = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta", requires_grad=True)
    noise = {"eps": case.eps, "step": StoredStep(case.x, case.x, a_less_one=less_one)}.get(kind, case.key)
    more = {}
    if kind == "everything":
        mask = torch.empty(SHAPE[:2], dtype=torch.bool, device="meta")
        more = {"v_reference": case.v_old, "v_uncond": v, "guidance_scale": 3.0, "mask": mask, "kl_weight": 0.1}
    if kind == "float64":
        b, s = b.double(), s.double()
    with counting() as counted:
        grpo_loss(v, case.v_old, b, s, noise, table[:, 4:6], weight, **CLIP, **more)[0].backward()
    kernels = {name for name in counted if name.startswith("triton")}
    assert kernels == {"triton _grpo_loss_fwd_kernel", "triton _shift_moments_bwd_kernel"}
    assert triton(counted) == 2
    # The gradient that a backward starts from, and a sum of two where both branches of guidance are one tensor; each
    # float64 coefficient is converted, forward and once more backward.
    allowed = {"everything": 2, "float64": 5}.get(kind, 1)
    assert aten(counted) <= allowed, counted


@pytest.mark.parametrize("noise", ["key", "eps"])
def test_compiled_on_a_cpu_it_is_the_eager_loss(noise):
    """Inductor sees the formula: a mask, a reference, several advantages, padding, losses of each sample."""
    case = inputs("cpu")
    mask = MASKS["tokens"](torch.Generator().manual_seed(3))
    weight = WEIGHT * torch.tensor([1.0, 0.0, 1.0, 1.0])
    given = case.key if noise == "key" else case.eps

    def call(v, given):
        arguments = v, case.v_old, case.b, case.s, given, ADVANTAGES, weight
        more = {"kl_weight": 0.1, "v_reference": case.v_old.flip(2), "mask": mask, "per_sample": True}
        return grpo_loss(*arguments, **CLIP, **FORMS, **more)

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        v = case.v.clone().requires_grad_()
        losses, statistics = function(v, given)
        (losses * torch.tensor([1.0, 2.0, -1.0, 0.5])).sum().backward()
        assert not statistics.values.requires_grad
        results.append((losses, statistics.values, 1e3 * gradient_of(v)))
    for found, expected in zip(*reversed(results), strict=True):
        close(found, expected)
