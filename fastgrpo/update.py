"""Trajectories + advantages -> optimizer steps, micro-batched over samples × steps at the rollout's forward shape.

Every micro-batch evaluates `forward_batch` rows; a row that a whole group shares is evaluated once and read by all
of its pairs. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.config import Config
from fastgrpo.models.base import Conditioning, ModelFamily
from fastgrpo.objective import Statistics, policy_loss
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import World, set_gradient_sync
from fastgrpo.rollout import Layout, Trajectory, lay_out, rank_samples, to_device
from fastgrpo.schedule import RolloutPlan, loss_scale
from fastgrpo_kernels import noise, shift_moments


@dataclass(frozen=True)
class MicroBatch:
    """Host arrays: rows [F] to evaluate; pairs [F, W] that read each row; weight [F, W], 0 where there is none."""

    rows: np.ndarray
    pairs: np.ndarray
    weight: np.ndarray


@dataclass
class UpdateResult:
    """Device-side results of one iteration's update: statistics of all and of the first optimizer step."""

    statistics: Statistics
    first: Statistics
    grad_norms: list[Tensor] = field(default_factory=list)
    skipped_steps: list[Tensor] = field(default_factory=list)


def micro_batches(layout: Layout, kept: np.ndarray, size: int, count: int) -> list[MicroBatch]:
    """`count` micro-batches of `size` rows covering the pairs of the kept samples (bool [n], local).

    What is left over is padding of weight 0, so that every rank runs equally many.
    """
    pairs = np.flatnonzero(kept[layout.pair_sample])
    rows, first = np.unique(layout.pair_row[pairs], return_index=True)
    width = np.diff(np.append(first, len(pairs)))
    batches = []
    for start in range(0, count * size, size):
        part = slice(start, start + size)
        real, wide = rows[part], width[part]
        grid = np.zeros((size, wide.max(initial=1)), dtype=np.int64)
        weight = np.zeros(grid.shape, dtype=np.float32)
        for place, (begin, number) in enumerate(zip(first[part], wide, strict=True)):
            grid[place, :number] = pairs[begin : begin + number]
            weight[place, :number] = 1
        batches.append(MicroBatch(np.pad(real, (0, size - len(real))), grid, weight))
    return batches


def rows_to_train(layout: Layout, kept: np.ndarray) -> int:
    """How many rows the kept samples' pairs read."""
    return len(np.unique(layout.pair_row[kept[layout.pair_sample]]))


@dataclass
class Updater:
    """The update phase of a run: `reference` gives the KL's reference model, None without a KL term."""

    family: ModelFamily
    config: Config
    world: World
    optimizer: OptimizerState
    reference: Callable[[], AbstractContextManager[nn.Module | None]] | None = None

    def run(
        self, plan: RolloutPlan, trajectory: Trajectory, conditioning: Conditioning, advantages: np.ndarray,
        trainable: np.ndarray, iteration: int,
    ) -> UpdateResult:  # fmt: skip
        """The optimizer steps of one iteration. advantages, trainable: [N] of all global samples, on every rank."""
        device = self.family.device
        coefficients = np.array([plan.transitions[t] for t in trajectory.layout.row_step], dtype=np.float64).reshape(
            -1, 3
        )
        batch = _Tensors(
            sigma=to_device(np.array(plan.sigmas, dtype=np.float32)[trajectory.layout.row_step], device),
            b=to_device(coefficients[trajectory.layout.pair_row, 1], device),
            s=to_device(coefficients[trajectory.layout.pair_row, 2], device),
            advantage=to_device(advantages[trajectory.layout.samples[trajectory.layout.pair_sample]], device).float(),
        )
        result = UpdateResult(Statistics.zeros(device), Statistics.zeros(device))
        steps, samples = self.config.update.optimizer_steps, len(advantages)
        worth = trainable & ((advantages != 0) | (self.config.objective.kl_weight > 0))
        scale = loss_scale(self.config.objective, plan) * self.world.size * steps / (samples * plan.pairs_per_sample)
        for k in range(steps):
            chosen = self._choose(plan, trajectory.layout, worth, k)
            if not chosen:
                continue
            statistics = Statistics.zeros(device)
            for place, micro in enumerate(chosen):
                last = place == len(chosen) - 1
                set_gradient_sync(self.family.transformer, last or self.config.update.grad_sync == "per_micro_batch")
                loss, counted = self._loss(micro, trajectory, conditioning, batch, iteration)
                (loss * scale).backward()
                statistics.add(counted)
            result.statistics.add(statistics)
            if k == 0:
                result.first.add(statistics)
            norm, skipped = self.optimizer.step()
            result.grad_norms.append(norm)
            result.skipped_steps.append(skipped)
        return result

    def _choose(self, plan: RolloutPlan, layout: Layout, worth: np.ndarray, k: int) -> list[MicroBatch]:
        """The micro-batches of the k-th optimizer step, as many as the rank that needs the most."""
        roll, steps, size = self.config.rollout, self.config.update.optimizer_steps, self.config.rollout.forward_batch
        needed = []
        for rank in range(self.world.size):
            samples = rank_samples(len(worth), steps, self.world.size, rank)
            theirs = layout if rank == self.world.rank else lay_out(plan, roll, samples.reshape(-1))
            needed.append(rows_to_train(theirs, worth[theirs.samples] & np.isin(theirs.samples, samples[k])))
        mine = rank_samples(len(worth), steps, self.world.size, self.world.rank)[k]
        kept = worth[layout.samples] & np.isin(layout.samples, mine)
        return micro_batches(layout, kept, size, -(-max(needed) // size))

    def _loss(
        self, micro: MicroBatch, trajectory: Trajectory, conditioning: Conditioning, batch: _Tensors, iteration: int
    ) -> tuple[Tensor, Statistics]:
        device, layout = self.family.device, trajectory.layout
        rows, pairs = to_device(micro.rows, device), to_device(micro.pairs.reshape(-1), device)
        x = trajectory.x.index_select(0, rows)
        sigma = batch.sigma.index_select(0, rows)
        condition = conditioning.rows(to_device(layout.row_prompt[micro.rows], device))
        v = _per_pair(self.family.predict(x, sigma, condition), micro)
        v_old = _per_pair(trajectory.v_old.index_select(0, rows), micro)
        b, s = batch.b.index_select(0, pairs), batch.s.index_select(0, pairs)
        eps = self._noise(micro, trajectory, iteration)
        P, Q = shift_moments(v, v_old, b, s, eps)
        Q_reference = None
        if self.reference is not None:
            with torch.no_grad(), self.reference() as transformer:
                v_reference = _per_pair(self.family.predict(x, sigma, condition, transformer), micro)
            _, Q_reference = shift_moments(v, v_reference, b, s, eps)
        weight = to_device(micro.weight.reshape(-1), device)
        advantage = batch.advantage.index_select(0, pairs)
        return policy_loss(P, Q, s.float(), advantage, weight, self.config.objective, Q_reference)

    def _noise(self, micro: MicroBatch, trajectory: Trajectory, iteration: int) -> Tensor | noise.NoiseKey:
        device, layout, pairs = self.family.device, trajectory.layout, micro.pairs.reshape(-1)
        if trajectory.noise is not None:
            return trajectory.noise.index_select(0, to_device(pairs, device))
        samples = to_device(layout.samples[layout.pair_sample[pairs]], device)
        steps = to_device(layout.row_step[layout.pair_row[pairs]], device)
        return noise.noise_key(self.config.run.seed, samples, steps, iteration, noise.STREAM_SDE, device)


@dataclass(frozen=True)
class _Tensors:
    sigma: Tensor  # [R] float32
    b: Tensor  # [M] float64
    s: Tensor  # [M] float64
    advantage: Tensor  # [M] float32


def _per_pair(rows: Tensor, micro: MicroBatch) -> Tensor:
    """[F, …] -> [F · W, …]: each row once for every pair. Its backward is a sum in a fixed order, no atomics."""
    width = micro.pairs.shape[1]
    if width == 1:
        return rows
    return rows.unsqueeze(1).expand(-1, width, *rows.shape[1:]).reshape(-1, *rows.shape[1:])
