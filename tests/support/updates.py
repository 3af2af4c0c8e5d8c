"""An update of a tiny rollout, and the loss as a textbook writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.schedule import StepSchedule, loss_scale
from fastgrpo.distributed.world import World
from fastgrpo.models import Conditioning, ModelFamily
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.sampler import forward_batches, rollout
from fastgrpo.rollout.trajectory import Trajectory
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.update import Updater
from fastgrpo_kernels import noise, shift_moments
from support.objective import policy_loss
from support.tiny import tiny_rollout_inputs

ALONE = World(0, 1, torch.device("cpu"))


class Recorder(OptimizerState):
    """Keeps the accumulated gradients of every optimizer step and changes no weight."""

    def __init__(self, policy, config):
        super().__init__(policy, config, 1)
        self.seen: list[list[Any]] = []

    def step(self):
        self.seen.append([None if p.grad is None else p.grad.clone() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return torch.zeros(()), torch.zeros(())


def prepare(
    config, move=0.0, optimizer: Callable[..., Any] = Recorder
) -> tuple[ModelFamily, StepSchedule, Trajectory, Conditioning, Any]:
    """A rollout, then weights moved by `move` standard deviations, and an updater."""
    family, schedule, layout, conditioning, _ = tiny_rollout_inputs(config)
    family.policy.to(family.dtype)
    trajectory = rollout(family, schedule, layout, conditioning, config.rollout, config.run.seed, 0)
    family.denoiser.requires_grad_(True)
    if move:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in family.denoiser.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * p.std(correction=0), alpha=move)
    updater = Updater(family, config, ALONE, optimizer(family.denoiser, config.update))
    return family, schedule, trajectory, conditioning, updater


def advantages(config, zeros=0):
    count = config.rollout.prompts_per_iteration * config.rollout.group_size
    values = np.random.default_rng(5).normal(size=count)
    values[:zeros] = 0
    return values


def textbook_loss(transformer, family, schedule, trajectory, conditioning, A, config):
    """DanceGRPO's loss in float64, by subtracting two log densities pair by pair."""
    layout, total = trajectory.layout, torch.zeros((), dtype=torch.float64)
    masks = family.mask_names
    rows = {
        name: tensor if name.removeprefix("negative_") in masks else tensor.double()
        for name, tensor in conditioning.items()
    }
    for pair, row in enumerate(layout.pair_row):
        step, sample = int(layout.row_step[row]), int(layout.pair_sample[pair])
        x, v_old = trajectory.x[row][None].double(), trajectory.v_old[row][None].double()
        sigma = torch.tensor([schedule.times[step]], dtype=torch.float64)
        condition = Conditioning(rows, conditioning.host).rows(np.array([layout.row_prompt[row]]))
        v = family.predict(x, sigma, condition, transformer)
        key = noise.noise_key(7, [int(layout.samples[sample])], step, 0, noise.STREAM_SDE, "cpu")
        a, b, s = schedule.transitions[step]
        y = a * x + b * v_old + s * noise.normal(key, family.latent_shape).double()
        new, old = (torch.distributions.Normal(a * x + b * w, s).log_prob(y).mean() for w in (v, v_old))
        ratio, advantage = torch.exp(new - old), A[layout.samples[sample]]
        clipped = ratio.clamp(1 - config.objective.clip_low, 1 + config.objective.clip_high)
        total = total + torch.maximum(-advantage * ratio, -advantage * clipped)
    return total / len(layout.pair_row)


def oracle_gradients(updater, schedule, trajectory, conditioning, A, kl_weight=0.0, iteration=0):
    """Loss and gradients by the objective in PyTorch, of float64 coefficients, over all pairs at once."""
    config, layout, device = updater.config, trajectory.layout, trajectory.x.device
    coefficients = torch.tensor([schedule.transitions[t] for t in layout.row_step], dtype=torch.float64)
    pair_row = torch.from_numpy(layout.pair_row)
    _, b, s = coefficients[pair_row].unbind(1)
    terms = torch.from_numpy(np.asarray(A, dtype=np.float64).reshape(len(A), -1)[layout.samples[layout.pair_sample]])
    times = torch.tensor(schedule.times, dtype=torch.float32)[torch.from_numpy(layout.row_step)]

    def outputs(model):
        rows = forward_batches(np.arange(len(layout.row_step)), config.rollout.forward_batch)
        predict = updater.family.predict
        parts = [
            predict(trajectory.x[part], times[part], conditioning.rows(layout.row_prompt[part]), model)[:real]
            for part, real in rows
        ]
        return torch.cat(parts)[pair_row]

    samples, steps = layout.samples[layout.pair_sample], layout.row_step[layout.pair_row]
    key = noise.noise_key(
        config.run.seed, samples.tolist(), torch.from_numpy(steps), iteration, noise.STREAM_SDE, device
    )  # fmt: skip
    [(name, model)] = updater.family.modules.items()
    to_reference = None
    v = outputs(model)
    P, Q = shift_moments(v, trajectory.v_old[pair_row], b, s, key)
    if updater.reference is not None:
        with torch.no_grad(), updater.reference() as frozen:
            v_reference = outputs(model if frozen is None else frozen[name])
        _, to_reference = shift_moments(v, v_reference, b, s, key)
    objective = config.objective.model_copy(update={"kl_weight": kl_weight})
    loss, _ = policy_loss(P, Q, s.float(), terms.float(), torch.ones(len(P)), objective, to_reference)
    scale = loss_scale(config.objective, schedule) / len(P)
    return float(loss.detach()), torch.autograd.grad(loss * scale, updater.optimizer.parameters, allow_unused=True)


def apart(found, expected):
    """How far gradients are from others, in norms of these."""
    known = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    norm = torch.stack([b.norm() for _, b in known]).norm()
    assert norm > 0
    return float(torch.stack([(a - b).norm() for a, b in known]).norm() / norm)


def run_update(updater, schedule, trajectory, conditioning, A, kl_weight=None):
    """The update of a batch whose samples are all trained. A: [N] or [N, T]."""
    terms = np.asarray(A, dtype=np.float64).reshape(len(A), -1)
    flat = np.zeros(len(trajectory.layout.prompts), dtype=bool)
    taken = Advantages(terms.sum(axis=1), terms, np.ones(len(A), dtype=bool), flat)
    weight = updater.config.objective.kl_weight if kl_weight is None else kl_weight
    return updater.run(Batch(0, np.arange(len(flat)), schedule, trajectory, conditioning), taken, weight)
