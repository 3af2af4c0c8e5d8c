"""What a training step launches through the step functions, counted on the meta device; and when tables are made."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.launches import aten, counting, triton

from fastgrpo_kernels import transitions
from fastgrpo_kernels.compat import GRPOLoss, _tables
from fastgrpo_kernels.compat._flow_schedule import _by_value
from fastgrpo_kernels.compat.dance_grpo import flux_step
from fastgrpo_kernels.compat.ddpo import ddim_step_with_logprob
from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

SIGMAS = torch.linspace(1, 0, 17)
SHAPE = (3, 4, 6, 6)


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(shape, device="meta", dtype=dtype, **options)


def scheduler_on(device="cpu"):
    """What the step functions use of their schedulers, in one."""
    return SimpleNamespace(
        sigmas=SIGMAS.clone().to(device),
        timesteps=(1000 * SIGMAS[:-1]).to(device),
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000).to(device),
        num_inference_steps=20,
        config=SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=False),
    )


def dance(v, x, y, scheduler, index):
    return flux_step(v, x, 0.3, scheduler.sigmas, index, y, True, True)[2]


def flow(v, x, y, scheduler, timesteps):
    return sde_step_with_logprob(scheduler, v, timesteps, x, 0.7, y)[1]


def cps(v, x, y, scheduler, timesteps):
    return sde_step_with_logprob(scheduler, v, timesteps, x, 0.7, y, sde_type="cps")[1]


def ddim(v, x, y, scheduler, timesteps):
    return ddim_step_with_logprob(scheduler, v, timesteps, x, 1.0, prev_sample=y)[1]


@pytest.mark.parametrize("function, most", [(dance, 1), (flow, 2), (cps, 2), (ddim, 1)])
@pytest.mark.parametrize("schedule", ["cpu", "meta"])
@pytest.mark.parametrize("steps", [(3,), (1,), ()])
def test_a_training_step_gathers_its_coefficients(function, most, schedule, steps):
    scheduler = scheduler_on(schedule)
    x, y, v = meta(*SHAPE), meta(*SHAPE), meta(*SHAPE, requires_grad=True)
    index = meta(*steps, dtype=torch.int64 if function in (dance, ddim) else torch.float32)
    with counting():
        function(v, x, y, scheduler, index)  # Makes the table.
    with counting() as counted:
        log_prob = function(v, x, y, scheduler, index)
        torch.autograd.grad(log_prob, v, torch.empty_like(log_prob))
    assert aten(counted) <= most, counted
    # The log-probability, its gradient, and the mean or the clean latents that the signature returns.
    assert triton(counted) == (2 if function is ddim else 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function, most", [(flow, 3), (ddim, 1)])
def test_a_column_of_a_batchs_timesteps_costs_a_copy_at_most(function, most):
    scheduler, v = scheduler_on(), meta(*SHAPE, requires_grad=True)
    column = meta(3, 10, dtype=torch.int64 if function is ddim else torch.float32)[:, 4]
    with counting():
        function(v, meta(*SHAPE), meta(*SHAPE), scheduler, column)
    with counting() as counted:
        function(v, meta(*SHAPE), meta(*SHAPE), scheduler, column)
    assert aten(counted) <= most, counted
    x, v, y = latents()
    steps = torch.tensor([401, 301, 201]) if function is ddim else scheduler.timesteps[[2, 5, 7]]
    strided = torch.stack([steps, steps + 1], 1)[:, 0]
    assert torch.equal(function(v, x, y, scheduler, strided), function(v, x, y, scheduler, steps))


def test_the_whole_loss_from_a_device_index_takes_three_launches_besides_the_kernels():
    x, v = meta(*SHAPE), meta(*SHAPE, requires_grad=True)
    table = torch.stack([*map(torch.as_tensor, transitions.dance_sde(SIGMAS[:-1], SIGMAS[1:], 0.3))]).float().to("meta")
    loss_fn, index, advantages = GRPOLoss(), meta(3, dtype=torch.int64), meta(3)
    with counting() as counted:
        _, b, s = table.index_select(1, index)
        loss, _ = loss_fn(v, v.detach(), b, s, x, advantages)
        torch.autograd.grad(loss, v, torch.empty_like(loss))
    assert aten(counted) <= 3, counted
    assert triton(counted) == 2, counted


def latents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def test_a_changed_schedule_has_new_coefficients():
    x, v, y = latents()
    scheduler, steps = scheduler_on(), torch.tensor([1, 2, 3])
    timesteps = scheduler.timesteps[steps]
    calls = [
        lambda: flux_step(v, x, 0.3, scheduler.sigmas, steps, y, True, True)[2],
        lambda: sde_step_with_logprob(scheduler, v, timesteps, x, 0.7, y)[1],
    ]
    before = [call() for call in calls]
    assert all(torch.equal(call(), value) for call, value in zip(calls, before, strict=True))
    shifted = 3 * SIGMAS / (1 + 2 * SIGMAS)
    scheduler.sigmas[1:-1] = shifted[1:-1]
    changed = [call() for call in calls]
    scheduler.sigmas = shifted.clone()
    replaced = [call() for call in calls]
    for old, new, same in zip(before, changed, replaced, strict=True):
        assert not torch.allclose(old, new)
        assert torch.equal(new, same)


def test_tables_are_made_once_and_dropped_with_their_schedule():
    x, v, y = latents()
    scheduler, steps = scheduler_on(), torch.tensor([1, 2, 3])
    made, kept = [], []
    for _ in range(2):
        flux_step(v, x, 0.3, scheduler.sigmas, steps, y, True, True)
        sde_step_with_logprob(scheduler, v, scheduler.timesteps[:3], x, 0.7, y)
        kept = [_tables._tables[schedule][2] for schedule in (scheduler.sigmas, scheduler.timesteps)]
        assert [len(tables) for tables in kept] == [1, 1]
        made.append([table for tables in kept for (*_, table) in tables.values()])
    assert all(first is second for first, second in zip(*made, strict=True))
    references = [weakref.ref(table) for table in made[0]]
    del scheduler, kept, made
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("function", [dance, flow, cps, ddim])
def test_a_rollout_in_inference_mode_leaves_tables_to_train_with(function):
    x, v, y = latents()
    scheduler, fresh = scheduler_on(), scheduler_on()
    steps = torch.tensor([1, 5, 9]) if function in (dance, ddim) else scheduler.timesteps[[1, 5, 9]]
    with torch.inference_mode():
        function(v, x, y, scheduler, steps)
    leaf = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf, x, y, scheduler, steps).sum(), leaf)
    (expected,) = torch.autograd.grad(function(leaf, x, y, fresh, steps).sum(), leaf)
    assert torch.equal(grad, expected)


def test_nothing_is_kept_of_what_a_graph_captures(monkeypatch):
    """Its memory is the graph's, and is written again by every replay."""
    schedule, made = (SIGMAS.clone(),), []

    def build():
        made.append(torch.zeros(1))
        return (made[-1],)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        assert _tables.cached(schedule, torch.device("cuda"), "settings", build)[0] is made[-1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert _tables.cached(schedule, torch.device("cuda"), "settings", build)[0] is made[2]


def test_schedules_of_the_inference_mode_are_read_anew():
    x, v, y = latents()
    steps = torch.tensor([1, 2, 3])
    with torch.inference_mode():
        sigmas = SIGMAS.clone()
        before = flux_step(v, x, 0.3, sigmas, steps, y, True, True)[2]
        sigmas[1:-1] *= 0.9
        assert not torch.allclose(flux_step(v, x, 0.3, sigmas, steps, y, True, True)[2], before)


@pytest.mark.parametrize("form", [float, lambda t: torch.tensor(t), lambda t: [t], lambda t: (torch.tensor(t),)])
def test_a_timestep_may_be_a_number_or_a_scalar(form):
    x, v, y = latents()
    scheduler = scheduler_on()
    scheduler.timesteps = scheduler.timesteps / 1.1
    expected = sde_step_with_logprob(scheduler, v, scheduler.timesteps[4:5], x, 0.7, y)
    found = sde_step_with_logprob(scheduler, v, form(scheduler.timesteps[4].item()), x, 0.7, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    whole = ddim_step_with_logprob(scheduler_on(), v, 401, x, 1.0, prev_sample=y)
    given = ddim_step_with_logprob(scheduler_on(), v, 401.0, x, 1.0, prev_sample=y)
    assert torch.equal(whole[1], given[1])
    with pytest.raises(ValueError, match=r"timestep: must be a whole number, got 401\.5"):
        ddim_step_with_logprob(scheduler_on(), v, 401.5, x, 1.0, prev_sample=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_what_is_no_timestep_has_no_coefficients(dtype):
    """Of a device nothing is read, so a wrong timestep has to show in the numbers."""
    timesteps = torch.tensor([900, 700, 700, 401, 3], dtype=dtype)
    bounds, table = _by_value(timesteps, torch.arange(5.0)[None])
    for asked, column in ((900, 0), (700, 2), (401, 3), (3, 4)):
        at = torch.searchsorted(bounds, torch.tensor([asked], dtype=dtype), right=True)
        assert table[0, at] == column
    for asked in (1000, 899, 701, 402, 400, 4, 2, -1):
        at = torch.searchsorted(bounds, torch.tensor([asked], dtype=dtype), right=True)
        assert table[0, at].isnan()


def test_timesteps_of_a_coarser_dtype_are_refused():
    """bfloat16 makes 978.26 of a schedule 976."""
    x, v, y = latents()
    scheduler = scheduler_on()
    with pytest.raises(ValueError, match=r"timestep: .*set_timesteps"):
        sde_step_with_logprob(scheduler, v, scheduler.timesteps[1:2].bfloat16(), x, 0.7, y)


@pytest.mark.parametrize("function", [dance, flow, cps, ddim])
def test_compiled_step_functions_are_the_eager_ones(function):
    x, v, y = latents()
    scheduler = scheduler_on()
    steps = torch.tensor([1, 5, 9]) if function in (dance, ddim) else scheduler.timesteps[[1, 5, 9]]

    def gradient(call):
        leaf = v.clone().requires_grad_()
        log_prob = call(leaf, x, y, scheduler, steps)
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), leaf)[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradient(compiled), gradient(function), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
