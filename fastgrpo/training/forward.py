"""Training on the forward process: final samples are noised again, and the policy is compared there with another one.

Rows of (x̂0, ε from a noise key, level from a keyed draw) are cut into the micro-batches of the update, all of one
shape. No noise is stored, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.arithmetic import trained_samples
from fastgrpo.algorithms.forward import ForwardLevels, LevelSource
from fastgrpo.algorithms.layout import epoch_samples
from fastgrpo.algorithms.objectives import ForwardObjective, RowInputs, RowSums, forward_objective
from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Config
from fastgrpo.distributed.fsdp import unsharded
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError
from fastgrpo.models.conditioning import Conditioning, to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.models.resized import resized
from fastgrpo.models.trainable import Reference
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.trajectory import take_rows
from fastgrpo.training.micro_batches import MicroBatch, OptimizerStep, epoch_draw
from fastgrpo.training.weights import Copies
from fastgrpo_kernels import MatchingTarget, gaussian_step, noise, shift_moments

# (x, time, conditioning, module) to the module's output, as `ModelFamily.predict`.
Predict = Callable[..., Tensor]

# Columns of a step's table; those of `ForwardLevels` first.
COLUMNS = ("times", "signal", "noise", "target_noise", "target_x0", "clean", "t", "advantage", "weight")


@dataclass(frozen=True)
class Units:
    """What is trained together, host arrays: samples [U, W] (global; one each, or a pair), and key [U], which names the
    noise and the levels of each."""

    samples: np.ndarray
    key: np.ndarray

    def of(self, chosen: np.ndarray) -> Units:
        return Units(self.samples[chosen], self.key[chosen])


def best_and_worst(advantages: Advantages, group: int, pairs: int) -> Units:
    """Of each group the best sample with the worst, the second best with the second worst, and so on.

    Args:
        advantages: Of all global samples; those that are not valid are in no pair.
        group: Samples of a group.
        pairs: How many pairs of each group at most; two samples of equal advantage are none.
    """
    samples, keys = [], []
    values = np.where(advantages.valid, advantages.values, np.nan).reshape(-1, group)
    for number, row in enumerate(values):
        order = np.argsort(row, kind="stable")[: np.count_nonzero(~np.isnan(row))]
        for place in range(min(pairs, len(order) // 2)):
            worst, best = order[place], order[-1 - place]
            if row[best] > row[worst]:
                samples.append([number * group + best, number * group + worst])
                keys.append(number * group + place)
    return Units(np.array(samples, dtype=np.int64).reshape(-1, 2), np.array(keys, dtype=np.int64))


class ForwardTraining:
    """The rows and the loss of a run's forward process.

    Args:
        family: The model, its weights ready.
        config: Of the run.
        world: This rank among its peers.
        levels: The noise levels of the rollout.
        copies: What the policy is compared with.
        held: Whether weights stay unsharded for a whole optimizer step.
        repeated: Gives what is called in place of `predict` for the other policies' outputs; a plan counts with it.

    Raises:
        ConfigError: Where pairs would not stay on one rank and in one optimizer step.
    """

    def __init__(
        self, family: ModelFamily, config: Config, world: World, levels: NoiseLevels, copies: Copies, held: bool = True,
        repeated: Callable[[Predict], Predict] = lambda predict: predict,
    ) -> None:  # fmt: skip
        objective = forward_objective(config)
        assert objective is not None
        self.objective: ForwardObjective = objective
        self.config, self.world, self.old, self.reference = config, world, copies.old, copies.reference
        self.held, self.repeated = held, repeated
        guidance = config.objective.guidance
        given = config.model if guidance is None else config.model.model_copy(update={"guidance": guidance})
        self.family = resized(family, given)
        if self.family.guided and not family.guided:
            raise ConfigError(
                f"objective.guidance: {guidance:g} needs negative prompts, which model.guidance "
                f"{config.model.guidance:g} does not encode; set it to null"
            )
        self.modules = list(family.modules)
        acting = partial(_acting, family, levels.prediction, self.modules)
        self.source = LevelSource(levels, config.objective.times, family.forward_table(), acting)
        prompts, steps = config.rollout.prompts_per_iteration, config.update.optimizer_steps
        self.samples = prompts * config.rollout.candidates
        # Rows of an epoch of an iteration, where every group has a spread.
        chosen = 2 * prompts * config.objective.pairs if objective.paired else trained_samples(config)
        self.expected = chosen * config.objective.times.count
        if objective.paired and prompts % (world.size * steps):
            raise ConfigError(
                f"rollout.prompts_per_iteration: the pairs of objective.kind {config.objective.kind} keep groups "
                f"whole, and {prompts} prompts do not divide over {world.size} ranks × {steps} optimizer steps"
            )

    def steps(
        self, batch: Batch, advantages: Advantages, kl_weight: float, epochs: Sequence[int]
    ) -> Iterator[OptimizerStep]:
        """The optimizer steps of one rollout in one iteration, in order.

        Args:
            batch: Its samples, as the rollout left them.
            advantages: Of all global samples.
            kl_weight: What the mean squared difference to the reference model's output is multiplied by.
            epochs: Numbers of the epochs; 0 is the first in which the rollout is trained.
        """
        config, count = self.config, self.config.update.optimizer_steps
        units = self._units(advantages, kl_weight)
        scale = self.world.ranks * count / self.expected
        for epoch in epochs:
            seed = [config.run.seed, noise.STREAM_FORWARD, batch.iteration, epoch]
            levels = self.source.draw(self.samples, seed)
            owners, step_of = self._owners(batch.iteration, epoch)
            for step in range(count):
                first = epoch == 0 and step == 0
                fresh = self.old is None or (first and config.objective.old_decay.copies)
                here = units.of(step_of[units.samples[:, 0]] == step)
                yield self._step(batch, advantages, here, owners, levels, epoch, kl_weight, fresh, scale)

    def _units(self, advantages: Advantages, kl_weight: float) -> Units:
        if self.objective.paired:
            return best_and_worst(advantages, self.config.rollout.candidates, self.config.objective.pairs)
        always = self.objective.trains_zero or kl_weight > 0 or self.config.objective.old_weight > 0
        samples = np.flatnonzero(advantages.valid & ((advantages.values != 0) | always))
        return Units(samples[:, None], samples)

    def _owners(self, iteration: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rank has each global sample, and which optimizer step of an epoch takes it, [N] each."""
        config, draw = self.config, epoch_draw(self.config, iteration, epoch)
        count, size, group = config.update.optimizer_steps, self.world.size, config.rollout.candidates
        owners, steps = np.zeros(self.samples, dtype=np.int64), np.zeros(self.samples, dtype=np.int64)
        for rank in range(size):
            shares = epoch_samples(self.samples, count, size, rank, group, draw)
            owners[shares] = rank
            steps[shares] = np.arange(count)[:, None]
        return owners, steps

    def _step(
        self, batch: Batch, advantages: Advantages, units: Units, owners: np.ndarray, levels: ForwardLevels, epoch: int,
        kl_weight: float, fresh: bool, scale: float,
    ) -> OptimizerStep:  # fmt: skip
        config, rank = self.config, self.world.rank
        size, width, draws = config.rollout.forward_batch, units.samples.shape[1], config.objective.times.count
        owner = owners[units.samples[:, 0]]
        rows, chosen = _RowTable.of(units.of(owner == rank), draws, int(batch.trajectory.layout.samples[0])), []
        policies = None if fresh or self.objective.against == "reference" else self.old, self.reference
        others = sum(policy is not None for policy in policies)
        for number, module in enumerate(self.modules):
            acts = levels.modules[units.key] == number
            needed = max(int(acts[owner == r].sum()) * width for r in range(self.world.size))
            mine = np.flatnonzero(levels.modules[rows.key[:-1], rows.draw[:-1]] == number)
            chosen += cut(mine, size, -(-needed // size), len(rows.key) - 1, module, others)
        inputs = _RowInputs.of(chosen, rows, batch, advantages, levels, config, epoch, self.family.device)
        outputs_of = partial(self._outputs_of, policies, batch, inputs)
        ahead = cache(partial(outputs_of, tuple(chosen)))

        def compared(micro: MicroBatch) -> list[dict[int, Tensor]]:
            # All rows with the first micro-batch, before the weights that it trains are unsharded. With a LoRA the
            # other policies are the trained components themselves, and nothing is unsharded for them.
            return outputs_of([micro]) if config.model.lora else ahead()

        return OptimizerStep(chosen, partial(self._loss, batch, inputs, kl_weight, compared), scale)

    def _noised(
        self, batch: Batch, inputs: _RowInputs, micro: MicroBatch
    ) -> tuple[Tensor, Tensor, noise.NoiseKey | Tensor, Conditioning]:
        """(x̂0, x, ε or its key, conditioning) of the rows of a micro-batch."""
        family, trajectory = self.family, batch.trajectory
        places, column = inputs.places[id(micro)], inputs.columns(micro)
        x0 = take_rows(trajectory.latents, inputs.local[places], inputs.on_device[places])
        key = noise.NoiseKey(inputs.key.seed, inputs.key.words[places])
        eps = noise.normal(key, family.latent_shape) if self.config.rollout.keeps_noise(family.device.type) else key
        x = gaussian_step(x0, x0, column["signal"], 0.0, column["noise"], eps)
        return x0, x, eps, batch.conditioning.rows(trajectory.layout.sample_prompt[inputs.local[places]])

    @torch.no_grad()
    def _outputs_of(
        self, policies: Sequence[Reference | None], batch: Batch, inputs: _RowInputs, chosen: Sequence[MicroBatch]
    ) -> list[dict[int, Tensor]]:
        """Each policy's outputs for the rows of micro-batches, by their `id`; none of a policy that is None."""
        family, found = self.family, [{} for _ in policies]
        for outputs, policy in zip(found, policies, strict=True):
            if policy is None:
                continue
            predict = self.repeated(family.predict)
            with policy() as copies, unsharded((copies or {}).values(), self.held):
                for micro in chosen:
                    _, x, _, condition = self._noised(batch, inputs, micro)
                    v = predict(x, inputs.columns(micro)["times"], condition, (copies or family.modules)[micro.module])
                    outputs[id(micro)] = family.of_policy(v)
        return found

    def _loss(
        self, batch: Batch, inputs: _RowInputs, kl_weight: float, compared: Callable[[MicroBatch], Any],
        micro: MicroBatch,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(loss, `LossStatistics.values`) of a micro-batch."""
        family, column = self.family, inputs.columns(micro)
        v_old, v_reference = (outputs.get(id(micro)) for outputs in compared(micro))
        if self.objective.against == "reference":
            v_old = v_reference
        x0, x, eps, condition = self._noised(batch, inputs, micro)
        v = family.of_policy(family.predict(x, column["times"], condition, family.modules[micro.module]))
        if isinstance(eps, Tensor):
            eps = family.of_policy(eps)
        old = v.detach() if v_old is None else v_old
        sums = matching_sums(
            v, old, family.of_policy(x0), eps, column["target_noise"], column["target_x0"], self.objective.branches
        )
        rows = RowInputs(column["advantage"], column["t"], column["clean"])
        found = self.objective.losses(sums, rows)
        loss, apart = found.loss, sums.Q
        if self.config.objective.old_weight:
            loss = loss + self.config.objective.old_weight * sums.Q
        if kl_weight and v_reference is not None:
            # Q alone: what P would be held against does not matter, and no noise is made again for it.
            _, apart = shift_moments(v, v_reference, 1.0, 1.0, family.of_policy(x0))
            loss = loss + kl_weight * apart
        weight = column["weight"]
        ratio, none = found.ratio.detach(), torch.zeros_like(weight)
        clipped = none if found.clipped is None else found.clipped
        each = torch.stack([ratio, clipped, apart.detach(), none, loss.detach(), torch.ones_like(weight)])
        deviation = torch.where(weight > 0, (ratio - 1).abs(), 0.0).amax()
        return (weight * loss).sum(), torch.cat([(weight * each).sum(1), deviation[None]])


@dataclass(frozen=True)
class _RowTable:
    """The rows of a rank in an optimizer step, and one of padding; host arrays.

    Attributes:
        sample: Global sample.
        key: That of the unit.
        draw: Which of the unit's levels.
    """

    sample: np.ndarray
    key: np.ndarray
    draw: np.ndarray

    @staticmethod
    def of(units: Units, draws: int, padding: int) -> _RowTable:
        """padding: the global sample of the last row, one that this rank has."""
        count, width = units.samples.shape
        sample = np.repeat(units.samples[:, None, :], draws, axis=1).reshape(-1)
        key, draw = units.key.repeat(draws * width), np.tile(np.arange(draws).repeat(width), count)
        return _RowTable(np.append(sample, padding), np.append(key, padding), np.append(draw, 0))


def cut(rows: np.ndarray, size: int, count: int, padding: int, module: str, others: int) -> list[MicroBatch]:
    """`count` micro-batches of `size` rows; what is left over is the row `padding`, of weight 0."""
    chosen = []
    for start in range(0, count * size, size):
        real = rows[start : start + size]
        weight = (np.arange(size) < len(real)).astype(np.float32)[:, None]
        padded = np.pad(real, (0, size - len(real)), constant_values=padding)
        last = start + size == count * size
        chosen.append(MicroBatch(padded, padded[:, None], weight, module, last, others))
    return chosen


@dataclass(frozen=True)
class _RowInputs:
    """What the micro-batches of an optimizer step need beside latents, one after the other.

    Attributes:
        places: Where the rows of each micro-batch are, by `id` of the micro-batch.
        local: Local sample of each row, on the host; on_device: the same on the device.
        key: The noise key of each row.
        table: COLUMNS of each row, float32, on the device.
    """

    places: dict[int, slice]
    local: np.ndarray
    on_device: Tensor
    key: noise.NoiseKey
    table: Tensor

    def columns(self, micro: MicroBatch) -> dict[str, Tensor]:
        """The columns of a micro-batch's rows, by name."""
        return dict(zip(COLUMNS, self.table[self.places[id(micro)]].unbind(1), strict=True))

    @staticmethod
    def of(
        chosen: Sequence[MicroBatch], rows: _RowTable, batch: Batch, advantages: Advantages, levels: ForwardLevels,
        config: Config, epoch: int, device: torch.device,
    ) -> _RowInputs:  # fmt: skip
        ends = np.cumsum([0, *(micro.rows.size for micro in chosen)]).tolist()
        places = {id(micro): slice(*ends[i : i + 2]) for i, micro in enumerate(chosen)}
        none = np.zeros(0, dtype=np.int64)
        index = np.concatenate([none, *(micro.rows for micro in chosen)])
        weight = np.concatenate([none, *(micro.weight[:, 0] for micro in chosen)])
        sample, key, draw = rows.sample[index], rows.key[index], rows.draw[index]
        columns = [*(getattr(levels, name)[key, draw] for name in COLUMNS[:-2]), advantages.values[sample], weight]
        step = draw + epoch * config.objective.times.count
        drawn = noise.noise_key(
            config.run.seed, to_device(key, device), to_device(step, device), batch.iteration, noise.STREAM_FORWARD,
            device,
        )  # fmt: skip
        local = np.searchsorted(batch.trajectory.layout.samples, sample)
        table = to_device(np.stack(columns, axis=1).astype(np.float32), device)
        return _RowInputs(places, local, to_device(local, device), drawn, table)


def matching_sums(
    v: Tensor, v_old: Tensor, x0: Tensor, eps: noise.NoiseKey | Tensor, target_noise: Tensor, target_x0: Tensor,
    branches: float | None,
) -> RowSums:  # fmt: skip
    """Returns the sums of rows v and v_old [B, …], whose targets are target_noise·ε + target_x0·x̂0.

    eps: ε, or its key. branches: as the objective has it.
    """
    target = MatchingTarget(x0, eps, target_noise, target_x0)
    if branches is None:
        return RowSums(*shift_moments(v, v_old, 1.0, 1.0, target))
    return RowSums(*shift_moments(v, v_old, 1.0, 1.0, target, residuals=branches))


def _acting(family: ModelFamily, prediction: Any, names: Sequence[str], times: np.ndarray) -> np.ndarray:
    """Which of the trained components acts at each of some times, as indices of `names`."""
    levels = tuple(times.reshape(-1).tolist())
    acting = family.acting_modules(NoiseLevels(levels, levels, levels, (names[0],) * len(levels), prediction))
    return np.array([names.index(name) for name in acting], dtype=np.int64).reshape(times.shape)
