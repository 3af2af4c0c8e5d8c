"""Updates: ratio exactly 1, the gradient of the textbook loss in float64, micro-batches that cover every pair once."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.launches import counting, triton
from support.tiny import tiny_config, tiny_rollout_inputs
from support.updates import ALONE, advantages, apart, oracle_gradients, prepare, run_update, textbook_loss

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.config.schema import Optimizer
from fastgrpo.distributed.residency import KEPT
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.trajectory import Trajectory
from fastgrpo.training import update
from fastgrpo.training.learning_rate import LearningRate
from fastgrpo.training.micro_batches import micro_batches, rows_to_train
from fastgrpo.training.update import Updater

WINDOW = {"kind": "window", "size": 2, "start": 1}
SUBSET = {"kind": "subset", "fraction": 0.6}
LAST = {"trained": {"kind": "subset", "fraction": 1.0}, "last_step": "trained", "sampler": "flow_sde", "eta": 0.7}


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("kept", ["keep", "regenerate"])
def test_on_policy_every_ratio_is_exactly_one(tiny_flux, trained, share, kept):
    config = tiny_config(tiny_flux, rollout={"trained": trained, "share_prefix": share, "noise": kept})
    _, schedule, trajectory, conditioning, updater = prepare(config)
    A = advantages(config, zeros=2)
    result = run_update(updater, schedule, trajectory, conditioning, A)
    assert result.statistics.max_deviation.item() == 0
    assert result.statistics.weight.item() == 4 * schedule.pairs_per_sample


ANTITHETIC = {"antithetic": True, "group_size": 4, "trained": {"kind": "window", "size": 1, "start": 1}}


@pytest.mark.parametrize("kept", ["keep", "regenerate"])
def test_a_reward_that_is_even_in_antithetic_noise_has_no_gradient(tiny_flux, kept):
    def gradient(values: list[float]) -> torch.Tensor:
        config = tiny_config(tiny_flux, rollout={**ANTITHETIC, "noise": kept})
        _, schedule, trajectory, conditioning, updater = prepare(config)
        result = run_update(updater, schedule, trajectory, conditioning, np.array(values, dtype=np.float64))
        assert result.statistics.max_deviation.item() == 0
        return torch.cat([g.reshape(-1) for g in updater.optimizer.seen[0] if g is not None])

    odd, even = gradient([1, -1, 2, -2, 1, -1, 0, 0]), gradient([1, 1, -1, -1, 2, 2, -2, -2])
    assert odd.norm() > 1e-4
    assert even.norm() < 1e-6 * odd.norm()


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
@pytest.mark.parametrize("move", [0.0, 3e-3], ids=["on policy", "off policy"])
def test_gradient_is_that_of_the_textbook_loss(tiny_flux, trained, move):
    config = tiny_config(tiny_flux, rollout={"trained": trained}, objective={"clip_low": 0.05, "clip_high": 0.05})
    family, schedule, trajectory, conditioning, updater = prepare(config, move)
    A = advantages(config)
    result = run_update(updater, schedule, trajectory, conditioning, A)
    assert (result.statistics.max_deviation.item() > 1e-5) is bool(move)

    exact = copy.deepcopy(family.denoiser).double()
    family.dtype = torch.float64
    loss = textbook_loss(exact, family, schedule, trajectory, conditioning, A, config)
    expected = torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True)
    [ours] = updater.optimizer.seen
    assert apart(ours, expected) < 2e-5

    # The textbook loss is itself checked by finite differences along a random direction of a few parameters.
    for parameter, gradient in list(zip(exact.parameters(), expected, strict=True))[:3]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-4)
                values.append(textbook_loss(exact, family, schedule, trajectory, conditioning, A, config))
                parameter.sub_(direction, alpha=sign * 1e-4)
        slope = (values[0] - values[1]) / 2e-4
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-7)


def test_a_trained_last_step_starts_at_ratio_one_and_has_a_gradient(tiny_flux):
    config = tiny_config(tiny_flux, rollout=LAST)
    _, schedule, trajectory, conditioning, updater = prepare(config)
    A = advantages(config)
    result = run_update(updater, schedule, trajectory, conditioning, A)
    assert schedule.pairs_per_sample == config.rollout.steps
    assert result.statistics.max_deviation.item() == 0
    assert result.statistics.weight.item() == 6 * config.rollout.steps
    assert max(g.abs().max().item() for g in updater.optimizer.seen[0] if g is not None) > 0


def test_skipping_zero_advantages_changes_no_gradient(tiny_flux):
    config = tiny_config(tiny_flux)
    seen = []
    for skip in (True, False):
        _, schedule, trajectory, conditioning, updater = prepare(config)
        A = advantages(config, zeros=3)
        if not skip:
            A[:3] = 1e-300
        run_update(updater, schedule, trajectory, conditioning, A)
        seen.append(updater.optimizer.seen[0])
    for a, b in zip(*seen, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)


def test_nothing_to_train_takes_no_step(tiny_flux):
    config = tiny_config(tiny_flux)
    _, schedule, trajectory, conditioning, updater = prepare(config)
    result = run_update(updater, schedule, trajectory, conditioning, np.zeros(6))
    assert updater.optimizer.seen == []
    assert result.statistics.weight.item() == 0


def test_optimizer_steps_take_equal_shares_of_whole_samples(tiny_flux):
    config = tiny_config(tiny_flux, update={"optimizer_steps": 2})
    whole = tiny_config(tiny_flux)
    _, schedule, trajectory, conditioning, updater = prepare(config)
    A = advantages(config)
    run_update(updater, schedule, trajectory, conditioning, A)
    first, second = updater.optimizer.seen
    *_, together = prepare(whole)
    run_update(together, schedule, trajectory, conditioning, A)
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


@pytest.mark.parametrize("objective", [{}, {"ratio": "ratio_norm"}, {"dual_clip": 1.5}], ids=["plain", "guard", "dual"])
@pytest.mark.parametrize("move", [0.0, 1e-4, 1e-2], ids=["on policy", "near", "far"])
@pytest.mark.parametrize("rewards", [1, 2])
def test_the_kernels_loss_has_the_gradient_of_the_objective_in_pytorch(tiny_flux, objective, move, rewards):
    config = tiny_config(tiny_flux, objective=objective)
    A = np.stack([advantages(config) * (i + 1) for i in range(rewards)], axis=1)
    _, schedule, trajectory, conditioning, updater = prepare(config, move)
    result = run_update(updater, schedule, trajectory, conditioning, A)
    _, _, _, _, again = prepare(config, move)
    loss, expected = oracle_gradients(again, schedule, trajectory, conditioning, A)
    pairs = result.statistics.weight.item()
    assert abs(result.statistics.loss.item() - loss) / pairs < 1e-7
    assert apart(updater.optimizer.seen[0], expected) < 1e-6
    assert (result.first.max_deviation.item() == 0) is (move == 0)


class Meta:
    """A family on the meta device whose model launches nothing."""

    device, dtype = torch.device("meta"), torch.bfloat16

    def __init__(self, rows, shape):
        self.modules = {"transformer": torch.nn.Identity()}
        self.output = torch.empty(rows, *shape, dtype=self.dtype, device="meta", requires_grad=True)

    def predict(self, *_):
        return self.output if torch.is_grad_enabled() else self.output.detach()

    def of_policy(self, rows):
        return rows


class Nothing:
    """Conditioning and optimizer of it."""

    parameters: ClassVar[list] = []
    rate: ClassVar[LearningRate] = LearningRate(Optimizer(), 1)

    def rows(self, index):
        return self

    def seed(self, gradient):
        return gradient

    def step(self):
        return torch.empty((), device="meta"), torch.empty((), device="meta")

    def end_iteration(self, iteration):
        pass


@pytest.mark.parametrize("form", ["key", "stored noise", "kl", "kl of v", "two rewards"])
def test_launches_of_a_micro_batch_beside_the_model(tiny_flux, monkeypatch, form):
    settings = {"kl": {"kl_weight": 0.1}, "kl of v": {"kl_weight": 0.1, "kl": "v"}}.get(form, {})
    config = tiny_config(tiny_flux, rollout={"share_prefix": False}, objective=settings)
    family, schedule, layout, *_ = tiny_rollout_inputs(config)
    shape, rows, pairs = family.latent_shape, len(layout.row_step), len(layout.pair_row)
    empty = partial(torch.empty, device="meta")
    stored = empty(pairs, *shape) if form == "stored noise" else None
    trajectory = Trajectory(layout, empty(0), empty(rows, *shape), empty(rows, *shape, dtype=torch.bfloat16), stored)
    monkeypatch.setattr(update, "to_device", lambda array, device: torch.from_numpy(array).to("meta"))
    reference: Any = (lambda: nullcontext({"transformer": None})) if settings else None
    terms = np.stack([advantages(config)] * (2 if form == "two rewards" else 1), axis=1)
    taken = Advantages(terms.sum(1), terms, np.ones(len(terms), bool), np.zeros(2, bool))
    counts = []
    for number in (1, 2):
        meta: Any = Meta(config.rollout.forward_batch, shape)
        nothing: Any = Nothing()
        updater = Updater(meta, config, ALONE, nothing, reference, KEPT, lambda chosen, n=number: chosen[:n])
        with counting() as counted:
            updater.run(Batch(0, np.arange(2), schedule, trajectory, nothing), taken, config.objective.kl_weight)
        counts.append(counted)
    each = counts[1] - counts[0]
    # Other conventions of the KL than the Gaussian take moments of their own.
    assert triton(each) == (5 if form == "kl of v" else 2), each
    assert sum(each.values()) <= (13 if form == "kl of v" else 10), each
