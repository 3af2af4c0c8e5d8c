"""Training on the forward process: exactly on policy, the gradient of the objective written out, resumed to the bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import finished, metrics, weights
from support.tiny import tiny_config

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.objectives import RowInputs
from fastgrpo.planning.dry_run import dry_run
from fastgrpo.training.forward import matching_sums
from fastgrpo.training.trainer import Trainer
from fastgrpo_kernels import noise

DECAY = {"rate": 0.05, "most": 0.5}
FORWARD: dict[str, Any] = {
    "nft": {"objective": {"kind": "nft", "times": {"count": 2}, "old_decay": DECAY}},
    "awm": {"objective": {"kind": "awm", "clip_low": 1.0, "clip_high": 1.0, "times": {"count": 2, "draw": "uniform"}}},
    "dpo": {"objective": {"kind": "dpo", "beta": 10.0, "times": {"count": 3}}},
}


def config_of(path, run_dir, kind, **sections):
    roll = {"shared_noise": False, "group_size": 4, **sections.pop("rollout", {})}
    return tiny_config(path, run_dir, rollout=roll, **{**FORWARD[kind], **sections})


def moved(trainer: Trainer, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.optimizer.parameters:
            p.add_(torch.randn(p.shape, generator=generator) * p.std(correction=0), alpha=by)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["nft", "awm", "dpo"])
def test_on_policy_every_ratio_is_exactly_one(tiny_flux, tmp_path, kind, lora, dtype):
    # The old policy is evaluated by weights of its own: nft from the start, awm where it is asked to decay.
    objective = {**FORWARD[kind]["objective"], **({} if kind == "dpo" else {"old_decay": DECAY})}
    model = {"dtype": dtype, "lora": lora}
    trainer = Trainer.from_config(config_of(tiny_flux, tmp_path, kind, objective=objective, model=model))
    found = trainer.step()
    assert found["ratio/first_max_deviation"] == found["kl"] == 0
    assert found["ratio/mean"] == 1
    assert found["grad_norm"] > 0
    batch = trainer.rollouts.take(1)
    assert len(batch.jobs[0][0].x) == len(batch.jobs[0][0].v_old) == 0
    # The policy has moved, and the other one has not, or by half as much.
    assert trainer.step()["ratio/first_max_deviation"] > 0


@pytest.mark.parametrize("kind", ["nft", "awm", "dpo"])
def test_gradient_is_that_of_the_objective_written_out(tiny_flux, tmp_path, kind):
    """Row by row from its key and its level, against a policy that the trained one has left."""
    objective = {**FORWARD[kind]["objective"], "old_decay": DECAY} if kind != "dpo" else FORWARD[kind]["objective"]
    trainer = Trainer.from_config(config_of(tiny_flux, tmp_path, kind, objective=objective))
    family, config, updater = trainer.family, trainer.config, trainer.updater
    batch = trainer.rollouts.take(0)
    trainer.rollouts.collect(batch)
    other = copy.deepcopy(family.denoiser)
    moved(trainer, 3e-3)
    seen = []
    trainer.optimizer.step = lambda: (  # pyright: ignore[reportAttributeAccessIssue]
        seen.extend(p.grad.clone() for p in trainer.optimizer.parameters if p.grad is not None),
        [setattr(p, "grad", None) for p in trainer.optimizer.parameters],
        (torch.zeros(()), torch.zeros(())),
    )[-1]
    values = np.random.default_rng(5).normal(size=8)
    taken = Advantages(values, values[:, None], np.ones(8, bool), np.zeros(2, bool))
    result = updater.run(batch, taken, 0.0)

    forward, times = updater.forward, config.objective.times
    assert forward is not None
    levels = forward.source.draw(8, [7, noise.STREAM_FORWARD, 0, 0])
    if kind == "dpo":
        groups = values.reshape(2, 4)
        owners = [(4 * g, [4 * g + row.argmax(), 4 * g + row.argmin()]) for g, row in enumerate(groups)]
    else:
        owners = [(sample, [sample]) for sample in range(8)]
    total, count = torch.zeros(()), 0
    for key, samples in owners:
        for draw in range(times.count):
            time, t = torch.tensor([levels.times[key, draw]]).float(), float(levels.noise[key, draw])
            x0 = batch.trajectory.latents[torch.tensor(samples)]
            words = noise.noise_key(7, [key] * len(samples), draw, 0, noise.STREAM_FORWARD, "cpu")
            eps = noise.normal(words, family.latent_shape)
            condition = batch.conditioning.rows(batch.trajectory.layout.sample_prompt[samples])
            x, every = (1 - t) * x0 + t * eps, time.expand(len(samples))
            with torch.no_grad():
                v_old = family.predict(x, every, condition, other)
            v = family.predict(x, every, condition)
            one = torch.ones(len(samples))
            sums = matching_sums(v, v_old, x0, eps, one, -one, forward.objective.branches)
            A = torch.from_numpy(values[samples]).float()
            total = total + forward.objective.losses(sums, RowInputs(A, every, every)).loss.sum()
            count += len(samples)
    assert result.statistics.weight.item() == count
    assert result.statistics.loss.item() == pytest.approx(total.item(), rel=1e-5)
    expected = torch.autograd.grad(total / count, trainer.optimizer.parameters)
    size = torch.stack([g.norm() for g in expected]).norm()
    apart = torch.stack([(a - b).norm() for a, b in zip(seen, expected, strict=True)]).norm()
    assert size > 1e-4
    assert apart / size < 1e-5


@pytest.mark.parametrize("kind", ["nft", pytest.param("awm", marks=pytest.mark.full), "dpo"])
def test_a_resumed_run_is_an_uninterrupted_one(tiny_flux, tmp_path, kind):
    settings = {"update": {"epochs": 2, "optimizer_steps": 2, "ema_decay": 0.9}, "checkpoint": {"every": 1}}
    straight = finished(config_of(tiny_flux, tmp_path / "straight", kind, train={"iterations": 3}, **settings))
    finished(config_of(tiny_flux, tmp_path / "run", kind, train={"iterations": 2}, **settings))
    run = {"dir": str(tmp_path / "run"), "seed": 7, "resume": True}
    resumed = finished(config_of(tiny_flux, tmp_path, kind, train={"iterations": 3}, run=run, **settings))
    one, two = weights(straight), weights(resumed)
    assert any(name.startswith("old.") for name in one) is (kind != "dpo")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "run")


@pytest.mark.parametrize("kind", ["nft", "awm"])
def test_the_old_policy_follows_as_it_says(tiny_flux, tmp_path, kind):
    config = config_of(tiny_flux, tmp_path, kind, update={"optimizer_steps": 2, "optimizer": {"lr": 1e-3}})
    trainer = Trainer.from_config(config)
    before = [p.detach().clone() for p in trainer.optimizer.parameters]
    trainer.step()
    assert trainer.optimizer.old is not None
    kept = 0.0 if kind == "awm" else 2 * DECAY["rate"]
    for old, new, first in zip(trainer.optimizer.old.parameters, trainer.optimizer.parameters, before, strict=True):
        assert torch.allclose(old, kept * first + (1 - kept) * new, atol=1e-7)
        assert torch.equal(old, new) is (kept == 0) or torch.equal(new, first)
    # What rolls out is the old policy, where it is not the policy.
    with trainer.rollouts.acting() as modules:
        assert (modules is trainer.family.modules) is (kind == "awm")


def test_each_epoch_has_other_noise_and_levels(tiny_flux, tmp_path):
    trainer = Trainer.from_config(config_of(tiny_flux, tmp_path, "awm", update={"epochs": 2}))
    forward = trainer.updater.forward
    assert forward is not None
    batch = trainer.rollouts.take(0)
    trainer.rollouts.collect(batch)
    values = np.ones(8)
    taken = Advantages(values, values[:, None], np.ones(8, bool), np.zeros(2, bool))
    drawn = []
    for step in forward.steps(batch, taken, 0.0, range(2)):
        inputs = step.loss.args[1]  # pyright: ignore[reportFunctionMemberAccess]
        drawn.append((inputs.key.words.tolist(), inputs.table[:, 0].tolist()))
        # Micro-batches of one shape, each row once.
        assert {micro.rows.shape for micro in step.micro_batches} == {(4,)}
        assert sum(micro.weight.sum() for micro in step.micro_batches) == 16
    (keys, times), (other_keys, other_times) = drawn
    assert not {tuple(k) for k in keys} & {tuple(k) for k in other_keys}
    assert not set(times) & set(other_times)


def test_a_rank_without_rows_runs_padding(tiny_flux, tmp_path):
    """Nothing is trained of the first group: its half of the rows is of weight 0."""
    trainer = Trainer.from_config(config_of(tiny_flux, tmp_path, "dpo"))
    batch = trainer.rollouts.take(0)
    trainer.rollouts.collect(batch)
    values = np.array([0.0] * 4 + [1.0, 2.0, 3.0, -1.0])
    taken = Advantages(values, values[:, None], np.ones(8, bool), np.zeros(2, bool))
    result = trainer.updater.run(batch, taken, 0.0)
    assert result.statistics.weight.item() == 2 * 3
    assert len(result.grad_norms) == 1


def test_guidance_may_be_left_out_of_training(tiny_flux, tmp_path):
    config = config_of(
        tiny_flux, tmp_path, "nft", objective={**FORWARD["nft"]["objective"], "guidance": 1.0}, model={"guidance": 4.0}
    )
    trainer = Trainer.from_config(config)
    assert trainer.updater.forward is not None
    assert (trainer.updater.forward.family.config.guidance, trainer.family.config.guidance) == (1.0, 4.0)
    assert trainer.step()["ratio/first_max_deviation"] == 0


def test_the_old_policy_and_the_trained_one_are_never_unsharded_together(tiny_flux):
    """Two ranks: what is gathered at the peak of an update is what GRPO gathers there."""
    rollout = {"gather": "once", "shared_noise": False}
    update = {"gather": "once", "grad_sync": "once"}
    grpo = dry_run(tiny_config(tiny_flux, rollout=rollout, update=update), 2)
    nft = dry_run(tiny_config(tiny_flux, **FORWARD["nft"], rollout=rollout, update=update), 2)
    assert nft.compared > 0
    theirs, ours = grpo.phases[-1], nft.phases[-1]
    assert ours.name == theirs.name == "update"
    assert 0 < ours.at_peak["gathers"] == theirs.at_peak["gathers"]


def test_a_plan_has_no_trajectory_and_an_old_policy(tiny_flux):
    """The same iteration under FakeTensorMode, where a read on the host raises."""
    grpo = dry_run(tiny_config(tiny_flux, rollout={"shared_noise": False}))
    nft = dry_run(tiny_config(tiny_flux, **FORWARD["nft"], rollout={"shared_noise": False}))
    awm = dry_run(tiny_config(tiny_flux, **FORWARD["awm"], rollout={"shared_noise": False}))

    def held(run, category):
        return run.phases[-1].at_peak.get(category, 0)

    copied = 4 * nft.trainable
    assert held(nft, "parameters") - held(awm, "parameters") == pytest.approx(copied, rel=0.01)
    assert nft.state - awm.state == copied
    latents = 6 * 16 * 4 * 4
    assert grpo.phases[0].at_peak["trajectories"] > held(nft, "trajectories") >= latents
    assert nft.trained == awm.trained == nft.compared == 12
    assert awm.compared == 0
    # Its update evaluates the old policy too.
    assert nft.phases[-1].cost.flops / awm.phases[-1].cost.flops == pytest.approx(4 / 3, rel=0.02)
