"""Trajectories + advantages -> optimizer steps, micro-batched over samples × steps at the rollout's forward shape.

Every micro-batch evaluates `forward_batch` rows; a row that a whole group shares is evaluated once and read by all
of its pairs. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.algorithms.layout import Layout, lay_out, rank_samples
from fastgrpo.algorithms.objectives.grpo import SUMMED, Statistics, policy_loss
from fastgrpo.algorithms.schedule import StepSchedule, kl_factors, loss_scale
from fastgrpo.config import Config
from fastgrpo.distributed.fsdp import hold_weights, set_gradient_sync
from fastgrpo.distributed.world import World
from fastgrpo.models.conditioning import Conditioning, to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.rollout.trajectory import Trajectory, take_rows
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.residency import KEPT, Residency
from fastgrpo_kernels import log_prob, noise, shift_moments


@dataclass(frozen=True)
class MicroBatch:
    """Host arrays: rows [F] to evaluate; pairs [F, W] that read each row; weight [F, W], 0 where there is none.

    module: which component evaluates them. syncs: its gradients are complete after this one.
    """

    rows: np.ndarray
    pairs: np.ndarray
    weight: np.ndarray
    module: str = ""
    syncs: bool = False


@dataclass
class UpdateResult:
    """Device-side results of one iteration's update: statistics of all and of the first optimizer step."""

    statistics: Statistics
    first: Statistics
    grad_norms: list[Tensor] = field(default_factory=list)
    skipped_steps: list[Tensor] = field(default_factory=list)


def micro_batches(
    layout: Layout, kept: np.ndarray, size: int, count: int, module: str = "", acts: np.ndarray | None = None
) -> list[MicroBatch]:
    """`count` micro-batches of `size` rows covering the pairs of the kept samples (bool [n], local).

    acts: bool [T], the steps at which `module` acts; None: all. What is left over is padding of weight 0, so that every
    rank runs equally many.
    """
    pairs = np.flatnonzero(_pairs_to_train(layout, kept, acts))
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
        last = start + size == count * size
        batches.append(MicroBatch(np.pad(real, (0, size - len(real))), grid, weight, module, last))
    return batches


def rows_to_train(layout: Layout, kept: np.ndarray, acts: np.ndarray | None = None) -> int:
    """How many rows the kept samples' pairs read, at the steps of `acts` (bool [T]; None: all)."""
    return len(np.unique(layout.pair_row[_pairs_to_train(layout, kept, acts)]))


def _pairs_to_train(layout: Layout, kept: np.ndarray, acts: np.ndarray | None) -> np.ndarray:
    pairs = kept[layout.pair_sample]
    return pairs if acts is None else pairs & acts[layout.row_step[layout.pair_row]]


@dataclass
class Updater:
    """The update phase of a run: `reference` gives the KL's reference components by name (None: the family's own, its
    LoRA being off); there is none without a KL term."""

    family: ModelFamily
    config: Config
    world: World
    optimizer: OptimizerState
    reference: Callable[[], AbstractContextManager[Mapping[str, nn.Module] | None]] | None = None
    residency: Residency = KEPT

    def run(
        self, plan: StepSchedule, trajectory: Trajectory, conditioning: Conditioning, advantages: np.ndarray,
        trainable: np.ndarray, iteration: int,
    ) -> UpdateResult:  # fmt: skip
        """The optimizer steps of one iteration. advantages [N] or [N, T], trainable [N]: of all global samples."""
        device = self.family.device
        coefficients = np.array([plan.transitions[t] for t in trajectory.layout.row_step], dtype=np.float64).reshape(
            -1, 3
        )
        factors = kl_factors(self.config.objective.kl, self.config.rollout.sampler, plan)
        batch = _Tensors(
            time=to_device(np.array(plan.times, dtype=np.float32)[trajectory.layout.row_step], device),
            a=to_device(coefficients[trajectory.layout.pair_row, 0], device),
            b=to_device(coefficients[trajectory.layout.pair_row, 1], device),
            s=to_device(coefficients[trajectory.layout.pair_row, 2], device),
            kl=to_device(factors[trajectory.layout.row_step[trajectory.layout.pair_row]], device).float(),
            advantage=to_device(advantages[trajectory.layout.samples[trajectory.layout.pair_sample]], device).float(),
        )
        result = UpdateResult(Statistics.zeros(device), Statistics.zeros(device))
        steps, samples = self.config.update.optimizer_steps, len(advantages)
        moves = (advantages.reshape(samples, -1) != 0).any(axis=1)
        worth = trainable & (moves | (self.config.objective.kl_weight > 0))
        # Of the planned pairs: with the best of N, those of the samples that are kept.
        planned = samples // self.config.rollout.candidates * self.config.rollout.group_size * plan.pairs_per_sample
        scale = loss_scale(self.config.objective, plan) * self.world.ranks * steps / planned
        for k in range(steps):
            chosen = self._choose(plan, trajectory.layout, worth, k)
            if not chosen:
                continue
            statistics = Statistics.zeros(device)
            for micro in chosen:
                module = self.family.modules[micro.module]
                set_gradient_sync(module, micro.syncs or not self.residency.sync_once)
                if self.residency.update_unsharded:
                    hold_weights(module, last=micro.syncs)
                loss, counted = self._loss(micro, trajectory, conditioning, batch, iteration)
                (loss * scale).backward()
                statistics.add(counted)
            result.statistics.add(statistics)
            if k == 0:
                result.first.add(statistics)
            norm, skipped = self.optimizer.step()
            result.grad_norms.append(norm)
            result.skipped_steps.append(skipped)
        self.optimizer.end_iteration(iteration)
        return result

    def _choose(self, plan: StepSchedule, layout: Layout, worth: np.ndarray, k: int) -> list[MicroBatch]:
        """The micro-batches of the k-th optimizer step, as many as the rank that needs the most."""
        roll, steps, size = self.config.rollout, self.config.update.optimizer_steps, self.config.rollout.forward_batch
        ranks = []
        for rank in range(self.world.size):
            samples = rank_samples(len(worth), steps, self.world.size, rank)
            theirs = layout if rank == self.world.rank else lay_out(plan, roll, samples.reshape(-1))
            ranks.append((theirs, worth[theirs.samples] & np.isin(theirs.samples, samples[k])))
        chosen = []
        # A component's rows stand together, so that every rank runs the same components in the same order.
        for module in dict.fromkeys(plan.modules):
            acts = np.array([name == module for name in plan.modules])
            needed = max(rows_to_train(theirs, kept, acts) for theirs, kept in ranks)
            _, mine = ranks[self.world.rank]
            chosen += micro_batches(layout, mine, size, -(-needed // size), module, acts)
        return chosen

    def _loss(
        self, micro: MicroBatch, trajectory: Trajectory, conditioning: Conditioning, batch: _Tensors, iteration: int
    ) -> tuple[Tensor, Statistics]:
        device, layout = self.family.device, trajectory.layout
        rows, pairs = to_device(micro.rows, device), to_device(micro.pairs.reshape(-1), device)
        x = take_rows(trajectory.x, micro.rows, rows)
        time = batch.time.index_select(0, rows)
        model = self.family.modules[micro.module]
        condition = conditioning.rows(layout.row_prompt[micro.rows])
        v = _per_pair(self.family.predict(x, time, condition, model), micro)
        b, s = batch.b.index_select(0, pairs), batch.s.index_select(0, pairs)
        weight = to_device(micro.weight.reshape(-1), device)
        advantage = batch.advantage.index_select(0, pairs)
        if trajectory.log_prob is not None and trajectory.y is not None:
            y, a = take_rows(trajectory.y, micro.pairs.reshape(-1), pairs), batch.a.index_select(0, pairs)
            new = log_prob(_per_pair(x, micro), v, y, a, b, s)
            P = new - trajectory.log_prob.index_select(0, pairs)
            return policy_loss(P, torch.zeros_like(P), s.float(), advantage, weight, self.config.objective)
        v_old = _per_pair(take_rows(trajectory.v_old, micro.rows, rows), micro)
        eps = self._noise(micro, trajectory, iteration)
        P, Q = shift_moments(v, v_old, b, s, eps)
        Q_reference = None
        if self.reference is not None:
            with torch.no_grad(), self.reference() as frozen:
                other = model if frozen is None else frozen[micro.module]
                v_reference = _per_pair(self.family.predict(x, time, condition, other), micro)
            _, Q_reference = shift_moments(v, v_reference, b, s, eps)
            Q_reference = Q_reference * batch.kl.index_select(0, pairs)
        return policy_loss(P, Q, s.float(), advantage, weight, self.config.objective, Q_reference)

    def _noise(self, micro: MicroBatch, trajectory: Trajectory, iteration: int) -> Tensor | noise.NoiseKey:
        device, layout, pairs = self.family.device, trajectory.layout, micro.pairs.reshape(-1)
        if trajectory.noise is not None:
            return take_rows(trajectory.noise, pairs, to_device(pairs, device))
        samples = to_device(layout.samples[layout.pair_sample[pairs]], device)
        steps = to_device(layout.row_step[layout.pair_row[pairs]], device)
        return noise.noise_key(self.config.run.seed, samples, steps, iteration, noise.STREAM_SDE, device)


@dataclass(frozen=True)
class _Tensors:
    time: Tensor  # [R] float32
    a: Tensor  # [M] float64
    b: Tensor  # [M] float64
    s: Tensor  # [M] float64
    kl: Tensor  # [M] float32, `kl_factors` of each pair's step
    advantage: Tensor  # [M] or [M, T] float32


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


def unpacked(vectors: np.ndarray) -> dict[str, float]:
    """Metrics of every rank's packed vector [world, …]."""
    sums = dict(zip(SUMMED, vectors[:, : len(SUMMED)].sum(axis=0), strict=True))
    pairs = max(sums["weight"], 1.0)
    deviation, first, norm, skipped = vectors[:, len(SUMMED) :].max(axis=0)
    return {
        "loss": sums["loss"] / pairs,
        "ratio/mean": sums["ratio"] / pairs,
        "ratio/max_deviation": deviation,
        "ratio/first_max_deviation": first,
        "clip_fraction": sums["clipped"] / pairs,
        "dppo_dropped": sums["dropped"] / pairs,
        "kl": sums["kl"] / pairs,
        "grad_norm": norm,
        "optimizer_steps/skipped": skipped,
    }
