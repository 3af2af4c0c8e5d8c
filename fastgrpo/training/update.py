"""Trajectories and advantages to optimizer steps, micro-batched over samples × steps at the rollout's forward shape.

Steps of trajectories are trained here, the forward process in forward.py beside this file. The loss is the kernels'
(fastgrpo_kernels.grpo_loss). What its micro-batches need beside latents is made once for an optimizer step, and each
takes a slice. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.arithmetic import trained_samples
from fastgrpo.algorithms.objectives.grpo import clipped_loss_settings
from fastgrpo.algorithms.schedule import kl_factors, loss_scale
from fastgrpo.config import Config
from fastgrpo.distributed.fsdp import hold_weights, reshard, set_gradient_sync
from fastgrpo.distributed.residency import KEPT, Residency
from fastgrpo.distributed.world import World
from fastgrpo.models.conditioning import to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.models.trainable import Reference
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.sampler import sde_key
from fastgrpo.rollout.trajectory import take_rows
from fastgrpo.training.forward import ForwardTraining
from fastgrpo.training.micro_batches import MicroBatch, OptimizerStep, epoch_draw, micro_batches_of_step
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.replay import Replay
from fastgrpo_kernels import LossStatistics, clipped_loss, grpo_loss, log_prob, noise, shift_moments
from fastgrpo_kernels.clipped_loss import FIELDS

# Goes through the micro-batches of an optimizer step. The memory plan runs only those that differ.
Walk = Callable[[Sequence[MicroBatch]], Iterable[MicroBatch]]


@dataclass
class UpdateResult:
    """Device-side results of one iteration's update.

    Attributes:
        device: Where they are.
        values: `LossStatistics.values` [7] of each micro-batch.
        in_first_step: How many of these belong to the first optimizer step.
        grad_norms: The gradient norm of each optimizer step, before clipping.
        skipped_steps: 1 for each optimizer step that was skipped, else 0.
        moved: `LossStatistics.values` of the first optimizer step's micro-batches, evaluated again after the last one:
            their kl is half of how far the update moved the policy.
    """

    device: torch.device
    values: list[Tensor] = field(default_factory=list)
    in_first_step: int = 0
    grad_norms: list[Tensor] = field(default_factory=list)
    skipped_steps: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)

    @property
    def statistics(self) -> LossStatistics:
        """Of all micro-batches."""
        return self._total(self.values)

    @property
    def first(self) -> LossStatistics:
        """Of the first optimizer step, where the policy has not moved yet."""
        return self._total(self.values[: self.in_first_step])

    def _total(self, values: Sequence[Tensor]) -> LossStatistics:
        return LossStatistics.total(values or [torch.zeros(len(FIELDS), device=self.device)])


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
        forward: The training of a forward process; None: that of steps of trajectories.
    """

    family: ModelFamily
    config: Config
    world: World
    optimizer: OptimizerState
    reference: Reference | None = None
    residency: Residency = KEPT
    walk: Walk = iter
    forward: ForwardTraining | None = None

    # Whatever a notebook, or a reward's module, has switched off.
    @torch.enable_grad()
    def run(self, batch: Batch, advantages: Advantages, kl_weight: float, replay: Replay | None = None) -> UpdateResult:
        """Takes the optimizer steps of one iteration.

        Args:
            batch: Its samples, as the rollout left them.
            advantages: Of all global samples.
            kl_weight: What the KL to the reference is multiplied by.
            replay: Earlier rollouts that are trained after it.

        Returns:
            Statistics on the device; nothing is read back to the host.
        """
        result, first = UpdateResult(self.family.device), None
        for number, step in enumerate(self._steps(batch, advantages, kl_weight, replay)):
            gradient = torch.full((), step.scale, dtype=torch.float32, device=self.family.device)
            before, seed = len(result.values), self.optimizer.seed(gradient)
            for micro in self.walk(step.micro_batches):
                module = self.family.modules[micro.module]
                set_gradient_sync(module, micro.syncs or not self.residency.sync_once)
                if self.residency.update_unsharded:
                    hold_weights(module, last=micro.syncs)
                loss, values = step.loss(micro)
                # The constant that divides by the number of pairs, without a launch of its own.
                loss.backward(seed)
                result.values.append(values)
            if len(result.values) == before:
                continue
            if number == 0:
                result.in_first_step = len(result.values)
                # Kept, with its inputs, only where it is needed again.
                first = step if self.optimizer.rate.asks(batch.iteration) else None
            norm, skipped = self.optimizer.step()
            result.grad_norms.append(norm)
            result.skipped_steps.append(skipped)
        if first is not None and first.movement is not None:
            with torch.no_grad():
                result.moved = [first.movement(micro)[1] for micro in self.walk(first.micro_batches)]
            # What `hold_weights` left unsharded, no backward shards again.
            reshard(self.family.modules.values())
        self.optimizer.end_iteration(batch.iteration)
        return result

    def _steps(
        self, batch: Batch, advantages: Advantages, kl_weight: float, replay: Replay | None
    ) -> Iterator[OptimizerStep]:
        """All optimizer steps of an iteration, in order."""
        steps, epochs = self.forward.steps if self.forward else self._transition_steps, self.config.update.epochs
        yield from steps(batch, advantages, kl_weight, range(epochs))
        if replay is not None:
            for age, kept in enumerate(replay.earlier):
                # An epoch that this rollout has not had yet.
                with replay.old_of(kept):
                    yield from steps(kept.batch, kept.advantages, kl_weight, [epochs + age])

    def _transition_steps(
        self, batch: Batch, advantages: Advantages, kl_weight: float, epochs: Sequence[int]
    ) -> Iterator[OptimizerStep]:
        """The optimizer steps of one rollout that train steps of trajectories, in order."""
        config, schedule, layout = self.config, batch.schedule, batch.trajectory.layout
        steps = config.update.optimizer_steps
        worth = advantages.valid & ((advantages.terms != 0).any(axis=1) | (kl_weight > 0))
        # With the best of N, those of the samples that are kept.
        pairs = trained_samples(config) * schedule.pairs_per_sample
        scale = loss_scale(config.objective, schedule) * self.world.ranks * steps / pairs
        for epoch in epochs:
            draw = epoch_draw(config, batch.iteration, epoch)
            for k in range(steps):
                chosen = micro_batches_of_step(config, self.world, schedule, layout, worth, k, draw)
                inputs = _StepInputs.of(chosen, batch, advantages, config, self.family.device)
                loss = partial(self._transition_loss, batch, inputs, kl_weight)
                yield OptimizerStep(chosen, partial(loss, self.reference), scale, partial(loss, None))

    def _transition_loss(
        self, batch: Batch, inputs: _StepInputs, kl_weight: float, reference: Reference | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """(loss, `LossStatistics.values`) of a micro-batch."""
        loss, statistics = self._clipped_loss(batch, inputs, kl_weight, reference, micro)
        return loss, statistics.values

    def _clipped_loss(
        self, batch: Batch, inputs: _StepInputs, kl_weight: float, reference: Reference | None, micro: MicroBatch
    ) -> tuple[Tensor, LossStatistics]:
        trajectory, objective = batch.trajectory, clipped_loss_settings(self.config.objective)
        part = inputs.of_micro(micro)
        x = take_rows(trajectory.x, micro.rows, part.rows)
        model = self.family.modules[micro.module]
        condition = batch.conditioning.rows(trajectory.layout.row_prompt[micro.rows])
        trained = self.family.of_policy
        v = _per_pair(trained(self.family.predict(x, part.time, condition, model)), micro)
        if trajectory.log_prob is not None and trajectory.y is not None:
            y = take_rows(trajectory.y, micro.pairs.reshape(-1), part.pairs)
            layout = trajectory.layout
            steps = layout.row_step[layout.pair_row[micro.pairs.reshape(-1)]]
            # In float64: a is near 1, and log-probabilities are subtracted.
            a, b, s = (to_device(c, v.device) for c in np.array(batch.schedule.transitions, dtype=np.float64)[steps].T)
            new = log_prob(_per_pair(trained(x), micro), v, y, a, b, s)
            moved = new - trajectory.log_prob.index_select(0, part.pairs)
            return clipped_loss(log_ratio=moved, advantages=part.advantages, weight=part.weight, **objective)
        v_old = _per_pair(trained(take_rows(trajectory.v_old, micro.rows, part.rows)), micro)
        key: noise.NoiseKey | Tensor = part.key
        if trajectory.noise is not None:
            key = take_rows(trajectory.noise, micro.pairs.reshape(-1), part.pairs)
        if reference is None:
            return grpo_loss(v, v_old, part.b, part.s, key, part.advantages, part.weight, **objective)
        with torch.no_grad(), reference() as frozen:
            other = model if frozen is None else frozen[micro.module]
            v_reference = _per_pair(trained(self.family.predict(x, part.time, condition, other)), micro)
        if self.config.objective.kl == "gaussian":
            return grpo_loss(
                v, v_old, part.b, part.s, key, part.advantages, part.weight, **objective, kl_weight=kl_weight,
                v_reference=v_reference,
            )  # fmt: skip
        P, Q = shift_moments(v, v_old, part.b, part.s, key)
        # The other conventions weigh the KL of a step by a factor of their own.
        # Q alone: what P would be held against does not matter, and no noise is made again for it.
        _, to_reference = shift_moments(v, v_reference, part.b, part.s, v_old)
        return clipped_loss(
            P, Q, part.s, part.advantages, part.weight, **objective, kl_weight=kl_weight,
            Q_reference=to_reference * part.kl,
        )  # fmt: skip


@dataclass(frozen=True)
class _MicroInputs:
    """The slices of `_StepInputs` that one micro-batch needs: F rows, and the F · W pairs that read them."""

    rows: Tensor
    time: Tensor
    pairs: Tensor
    b: Tensor
    s: Tensor
    kl: Tensor
    weight: Tensor
    advantages: Tensor
    key: noise.NoiseKey


@dataclass(frozen=True)
class _StepInputs:
    """What the micro-batches of an optimizer step need beside latents, on the device, one after the other.

    Attributes:
        places: Where the rows and the pairs of each micro-batch begin, by `id` of the micro-batch.
        rows: Rows of the trajectory, int64 [n · F].
        time: Noise level of each row, float32 [n · F].
        pairs: Pairs of the trajectory, int64 [m].
        key: The noise key of each pair.
        table: Columns b, s, the KL's factor, weight and R advantages of each pair, float32 [m, 4 + R].
    """

    places: dict[int, tuple[int, int]]
    rows: Tensor
    time: Tensor
    pairs: Tensor
    key: noise.NoiseKey
    table: Tensor

    @staticmethod
    def of(
        chosen: Sequence[MicroBatch], batch: Batch, advantages: Advantages, config: Config, device: torch.device
    ) -> _StepInputs:
        schedule, layout = batch.schedule, batch.trajectory.layout
        places, first_row, first_pair = {}, 0, 0
        for micro in chosen:
            places[id(micro)] = first_row, first_pair
            first_row, first_pair = first_row + micro.rows.size, first_pair + micro.pairs.size
        rows = _joined([micro.rows for micro in chosen])
        pairs = _joined([micro.pairs.reshape(-1) for micro in chosen])
        weight = _joined([micro.weight.reshape(-1) for micro in chosen])
        steps, samples = layout.row_step[layout.pair_row[pairs]], layout.samples[layout.pair_sample[pairs]]
        transitions = np.array(schedule.transitions, dtype=np.float64)[steps].reshape(-1, 3)
        factors = kl_factors(config.objective.kl, config.rollout.sampler, schedule)[steps]
        columns = [transitions[:, 1], transitions[:, 2], factors, weight, *advantages.terms[samples].T]
        time = np.array(schedule.times, dtype=np.float32)[layout.row_step[rows]]
        owners, seed = to_device(samples, device), config.run.seed
        key = sde_key(config.rollout, seed, owners, to_device(steps, device), batch.iteration)
        table = to_device(np.stack(columns, axis=1).astype(np.float32), device)
        return _StepInputs(
            places, to_device(rows, device), to_device(time, device), to_device(pairs, device), key, table
        )

    def of_micro(self, micro: MicroBatch) -> _MicroInputs:
        first_row, first_pair = self.places[id(micro)]
        rows, pairs = slice(first_row, first_row + micro.rows.size), slice(first_pair, first_pair + micro.pairs.size)
        table = self.table[pairs]
        b, s, kl, weight = table[:, :4].unbind(1)
        advantages = table[:, 4] if table.shape[1] == 5 else table[:, 4:]
        key = noise.NoiseKey(self.key.seed, self.key.words[pairs])
        return _MicroInputs(self.rows[rows], self.time[rows], self.pairs[pairs], b, s, kl, weight, advantages, key)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _per_pair(rows: Tensor, micro: MicroBatch) -> Tensor:
    """[F, …] -> [F · W, …]: each row once for every pair. Its backward is a sum in a fixed order, no atomics."""
    width = micro.pairs.shape[1]
    if width == 1:
        return rows
    return rows.unsqueeze(1).expand(-1, width, *rows.shape[1:]).reshape(-1, *rows.shape[1:])


def packed(result: UpdateResult) -> Tensor:
    """Returns the update's statistics as one float64 vector on the device, as `update_metrics` reads it."""
    none = [torch.zeros((), device=result.device)]
    norm = torch.stack(result.grad_norms or none).double().mean()
    skipped = torch.stack(result.skipped_steps or none).double().sum()
    parts = [result.statistics.values, torch.stack([result.first.max_deviation, norm, skipped])]
    if result.moved:
        moved = LossStatistics.total(result.moved)
        parts.append(torch.stack([moved.kl, moved.weight]))
    return torch.cat(parts)
