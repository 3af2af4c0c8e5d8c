"""Updates: ratio exactly 1, the gradient of the textbook loss in float64, micro-batches that cover every pair once."""

import copy

import numpy as np
import pytest
import torch
from support.tiny import tiny_config, tiny_rollout_inputs
from support.updates import advantages, prepare, run_update, textbook_loss

from fastgrpo.training.micro_batches import micro_batches, rows_to_train

WINDOW = {"kind": "window", "size": 2, "start": 1}
SUBSET = {"kind": "subset", "fraction": 0.6}
LAST = {"trained": {"kind": "subset", "fraction": 1.0}, "last_step": "trained", "sampler": "flow_sde", "eta": 0.7}


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("kept", ["keep", "regenerate"])
def test_on_policy_every_ratio_is_exactly_one(tiny_flux, trained, share, kept):
    config = tiny_config(tiny_flux, rollout={"trained": trained, "share_prefix": share, "noise": kept})
    _, plan, trajectory, conditioning, updater = prepare(config)
    A = advantages(config, zeros=2)
    result = run_update(updater, plan, trajectory, conditioning, A)
    assert result.statistics.max_deviation.item() == 0
    assert result.statistics.sums[-1].item() == 4 * plan.pairs_per_sample


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
@pytest.mark.parametrize("move", [0.0, 3e-3], ids=["on policy", "off policy"])
def test_gradient_is_that_of_the_textbook_loss(tiny_flux, trained, move):
    config = tiny_config(tiny_flux, rollout={"trained": trained}, objective={"clip_low": 0.05, "clip_high": 0.05})
    family, plan, trajectory, conditioning, updater = prepare(config, move)
    A = advantages(config)
    result = run_update(updater, plan, trajectory, conditioning, A)
    assert (result.statistics.max_deviation.item() > 1e-5) is bool(move)

    exact = copy.deepcopy(family.denoiser).double()
    family.dtype = torch.float64
    loss = textbook_loss(exact, family, plan, trajectory, conditioning, A, config)
    expected = torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True)
    [ours] = updater.optimizer.seen
    size = torch.stack([g.norm() for g in expected if g is not None]).norm()
    apart = torch.stack([(o - e).norm() for o, e in zip(ours, expected, strict=True) if e is not None]).norm()
    assert size > 1e-4
    assert apart / size < 2e-5

    # The textbook loss is itself checked by finite differences along a random direction of a few parameters.
    for parameter, gradient in list(zip(exact.parameters(), expected, strict=True))[:3]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-4)
                values.append(textbook_loss(exact, family, plan, trajectory, conditioning, A, config))
                parameter.sub_(direction, alpha=sign * 1e-4)
        slope = (values[0] - values[1]) / 2e-4
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-7)


def test_a_trained_last_step_starts_at_ratio_one_and_has_a_gradient(tiny_flux):
    config = tiny_config(tiny_flux, rollout=LAST)
    _, plan, trajectory, conditioning, updater = prepare(config)
    A = advantages(config)
    result = run_update(updater, plan, trajectory, conditioning, A)
    assert plan.pairs_per_sample == config.rollout.steps
    assert result.statistics.max_deviation.item() == 0
    assert result.statistics.sums[-1].item() == 6 * config.rollout.steps
    assert max(g.abs().max().item() for g in updater.optimizer.seen[0] if g is not None) > 0


def test_skipping_zero_advantages_changes_no_gradient(tiny_flux):
    config = tiny_config(tiny_flux)
    seen = []
    for skip in (True, False):
        _, plan, trajectory, conditioning, updater = prepare(config)
        A = advantages(config, zeros=3)
        if not skip:
            A[:3] = 1e-300
        run_update(updater, plan, trajectory, conditioning, A)
        seen.append(updater.optimizer.seen[0])
    for a, b in zip(*seen, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)


def test_nothing_to_train_takes_no_step(tiny_flux):
    config = tiny_config(tiny_flux)
    _, plan, trajectory, conditioning, updater = prepare(config)
    result = run_update(updater, plan, trajectory, conditioning, np.zeros(6))
    assert updater.optimizer.seen == []
    assert result.statistics.sums[-1].item() == 0


def test_optimizer_steps_take_equal_shares_of_whole_samples(tiny_flux):
    config = tiny_config(tiny_flux, update={"optimizer_steps": 2})
    whole = tiny_config(tiny_flux)
    _, plan, trajectory, conditioning, updater = prepare(config)
    A = advantages(config)
    run_update(updater, plan, trajectory, conditioning, A)
    first, second = updater.optimizer.seen
    *_, together = prepare(whole)
    run_update(together, plan, trajectory, conditioning, A)
    for a, b, c in zip(first, second, together.optimizer.seen[0], strict=True):
        assert torch.allclose((a + b) / 2, c, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("count_samples", range(7))
def test_micro_batches_cover_every_kept_pair_once(tiny_flux, count_samples):
    config = tiny_config(tiny_flux, rollout={"trained": {"kind": "window", "size": 3, "start": 0}})
    *_, layout, _, _ = tiny_rollout_inputs(config)
    kept = np.random.default_rng(0).permutation(6) < count_samples
    rows = rows_to_train(layout, kept)
    batches = micro_batches(layout, kept, 4, -(-rows // 4) + 1)
    pairs = np.concatenate([b.pairs[b.weight > 0] for b in batches])
    assert sorted(pairs) == list(np.flatnonzero(kept[layout.pair_sample]))
    for b in batches:
        assert b.rows.shape == (4,)
        place, _ = np.nonzero(b.weight)
        assert (layout.pair_row[b.pairs[b.weight > 0]] == b.rows[place]).all()


def test_a_shared_row_is_evaluated_once_for_its_whole_group(tiny_flux):
    config = tiny_config(tiny_flux, rollout={"trained": {"kind": "window", "size": 1, "start": 1}})
    *_, layout, _, _ = tiny_rollout_inputs(config)
    assert rows_to_train(layout, np.ones(6, bool)) == 2
    [batch] = micro_batches(layout, np.ones(6, bool), 4, 1)
    assert batch.weight.sum() == 6
    assert batch.pairs.shape == (4, 3)
