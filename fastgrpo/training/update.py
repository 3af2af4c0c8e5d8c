"""Trajectories and advantages to optimizer steps, micro-batched over samples × steps at the rollout's forward shape.

Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.objectives.grpo import Statistics, policy_loss
from fastgrpo.algorithms.schedule import kl_factors, loss_scale
from fastgrpo.config import Config
from fastgrpo.distributed.fsdp import hold_weights, set_gradient_sync
from fastgrpo.distributed.world import World
from fastgrpo.models.conditioning import to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.models.trainable import Reference
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.trajectory import Trajectory, take_rows
from fastgrpo.training.micro_batches import MicroBatch, micro_batches_of_step
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.residency import KEPT, Residency
from fastgrpo_kernels import log_prob, noise, shift_moments

# Goes through the micro-batches of an optimizer step. The memory plan runs only those that differ.
Walk = Callable[[Sequence[MicroBatch]], Iterable[MicroBatch]]


@dataclass
class UpdateResult:
    """Device-side results of one iteration's update: statistics of all and of the first optimizer step."""

    statistics: Statistics
    first: Statistics
    grad_norms: list[Tensor] = field(default_factory=list)
    skipped_steps: list[Tensor] = field(default_factory=list)


@dataclass
class Updater:
    """The update phase of a run.

    Args:
        family: The model, its weights ready.
        config: Of the run.
        world: This rank among its peers.
        optimizer: Takes the steps.
        reference: Gives the components that a KL term compares with; None without one.
        residency: What stays unsharded between uses.
        walk: Which micro-batches of an optimizer step are run, and in which order; all of them.
    """

    family: ModelFamily
    config: Config
    world: World
    optimizer: OptimizerState
    reference: Reference | None = None
    residency: Residency = KEPT
    walk: Walk = iter

    def run(self, batch: Batch, advantages: Advantages, kl_weight: float) -> UpdateResult:
        """Takes the optimizer steps of one iteration.

        Args:
            batch: Its samples, as the rollout left them.
            advantages: Of all global samples.
            kl_weight: What the Gaussian KL to the reference is multiplied by.

        Returns:
            Statistics on the device; nothing is read back to the host.
        """
        device, schedule = self.family.device, batch.schedule
        factors = kl_factors(self.config.objective.kl, self.config.rollout.sampler, schedule)
        inputs = _Inputs.of(batch, advantages, factors, device)
        result = UpdateResult(Statistics.zeros(device), Statistics.zeros(device))
        steps, samples = self.config.update.optimizer_steps, len(advantages.terms)
        worth = advantages.valid & ((advantages.terms != 0).any(axis=1) | (kl_weight > 0))
        # Of the planned pairs: with the best of N, those of the samples that are kept.
        planned = samples // self.config.rollout.candidates * self.config.rollout.group_size * schedule.pairs_per_sample
        scale = loss_scale(self.config.objective, schedule) * self.world.ranks * steps / planned
        for k in range(steps):
            chosen = micro_batches_of_step(self.config, self.world, schedule, batch.trajectory.layout, worth, k)
            statistics, ran = Statistics.zeros(device), False
            for micro in self.walk(chosen):
                ran = True
                module = self.family.modules[micro.module]
                set_gradient_sync(module, micro.syncs or not self.residency.sync_once)
                if self.residency.update_unsharded:
                    hold_weights(module, last=micro.syncs)
                loss, counted = self._loss(micro, batch, inputs, kl_weight)
                self.optimizer.backward(loss * scale)
                statistics.add(counted)
            if not ran:
                continue
            result.statistics.add(statistics)
            if k == 0:
                result.first.add(statistics)
            norm, skipped = self.optimizer.step()
            result.grad_norms.append(norm)
            result.skipped_steps.append(skipped)
        self.optimizer.end_iteration(batch.iteration)
        return result

    def _loss(self, micro: MicroBatch, batch: Batch, inputs: _Inputs, kl_weight: float) -> tuple[Tensor, Statistics]:
        device, trajectory, layout = self.family.device, batch.trajectory, batch.trajectory.layout
        objective = self.config.objective
        rows, pairs = to_device(micro.rows, device), to_device(micro.pairs.reshape(-1), device)
        x = take_rows(trajectory.x, micro.rows, rows)
        time = inputs.time.index_select(0, rows)
        model = self.family.modules[micro.module]
        condition = batch.conditioning.rows(layout.row_prompt[micro.rows])
        v = _per_pair(self.family.predict(x, time, condition, model), micro)
        b, s = inputs.b.index_select(0, pairs), inputs.s.index_select(0, pairs)
        weight = to_device(micro.weight.reshape(-1), device)
        advantage = inputs.advantage.index_select(0, pairs)
        if trajectory.log_prob is not None and trajectory.y is not None:
            y, a = take_rows(trajectory.y, micro.pairs.reshape(-1), pairs), inputs.a.index_select(0, pairs)
            new = log_prob(_per_pair(x, micro), v, y, a, b, s)
            P = new - trajectory.log_prob.index_select(0, pairs)
            return policy_loss(P, torch.zeros_like(P), s.float(), advantage, weight, objective, kl_weight)
        v_old = _per_pair(take_rows(trajectory.v_old, micro.rows, rows), micro)
        eps = self._noise(micro, trajectory, batch.iteration)
        P, Q = shift_moments(v, v_old, b, s, eps)
        Q_reference = None
        if self.reference is not None:
            with torch.no_grad(), self.reference() as frozen:
                other = model if frozen is None else frozen[micro.module]
                v_reference = _per_pair(self.family.predict(x, time, condition, other), micro)
            _, Q_reference = shift_moments(v, v_reference, b, s, eps)
            Q_reference = Q_reference * inputs.kl.index_select(0, pairs)
        return policy_loss(P, Q, s.float(), advantage, weight, objective, kl_weight, Q_reference)

    def _noise(self, micro: MicroBatch, trajectory: Trajectory, iteration: int) -> Tensor | noise.NoiseKey:
        device, layout, pairs = self.family.device, trajectory.layout, micro.pairs.reshape(-1)
        if trajectory.noise is not None:
            return take_rows(trajectory.noise, pairs, to_device(pairs, device))
        samples = to_device(layout.samples[layout.pair_sample[pairs]], device)
        steps = to_device(layout.row_step[layout.pair_row[pairs]], device)
        return noise.noise_key(self.config.run.seed, samples, steps, iteration, noise.STREAM_SDE, device)


@dataclass(frozen=True)
class _Inputs:
    """What the pairs of an iteration need beside its trajectory, on the device."""

    time: Tensor  # [R] float32
    a: Tensor  # [M] float64
    b: Tensor  # [M] float64
    s: Tensor  # [M] float64
    kl: Tensor  # [M] float32, `kl_factors` of each pair's step
    advantage: Tensor  # [M, T] float32

    @staticmethod
    def of(batch: Batch, advantages: Advantages, factors: np.ndarray, device: torch.device) -> _Inputs:
        layout, schedule = batch.trajectory.layout, batch.schedule
        coefficients = np.array([schedule.transitions[t] for t in layout.row_step], dtype=np.float64).reshape(-1, 3)
        a, b, s = (to_device(coefficients[layout.pair_row, column], device) for column in range(3))
        time = to_device(np.array(schedule.times, dtype=np.float32)[layout.row_step], device)
        kl = to_device(factors[layout.row_step[layout.pair_row]], device).float()
        terms = to_device(advantages.terms[layout.samples[layout.pair_sample]], device).float()
        return _Inputs(time, a, b, s, kl, terms)


def _per_pair(rows: Tensor, micro: MicroBatch) -> Tensor:
    """[F, …] -> [F · W, …]: each row once for every pair. Its backward is a sum in a fixed order, no atomics."""
    width = micro.pairs.shape[1]
    if width == 1:
        return rows
    return rows.unsqueeze(1).expand(-1, width, *rows.shape[1:]).reshape(-1, *rows.shape[1:])


def packed(result: UpdateResult) -> Tensor:
    """The update's statistics as one float64 vector on the device."""
    device = result.statistics.sums.device
    norms = [n.double() for n in result.grad_norms] or [torch.zeros((), dtype=torch.float64, device=device)]
    skipped = [s.double() for s in result.skipped_steps] or [torch.zeros((), dtype=torch.float64, device=device)]
    extremes = [result.statistics.max_deviation, result.first.max_deviation]
    tail = torch.stack([*extremes, torch.stack(norms).mean(), torch.stack(skipped).sum()])
    return torch.cat([result.statistics.sums, tail])
