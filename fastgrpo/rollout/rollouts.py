"""The batches of a run, one an iteration: prompts drawn, samples rolled out, and the scores of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages, compute_advantages, group_spread
from fastgrpo.algorithms.layout import rank_samples
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt
from fastgrpo.data.samplers import SpreadSampler, prompt_sampler
from fastgrpo.distributed.world import World
from fastgrpo.errors import UserError
from fastgrpo.models.loading import levels_of
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.observe.metrics import reward_metrics
from fastgrpo.observe.timers import PhaseTimer
from fastgrpo.rewards import Reward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import AllScores, gather_scores
from fastgrpo.rollout.generator import Acting, Batch, Generator, flight_scores, flight_state, keep_extremes
from fastgrpo.rollout.trajectory import tensors


class Rollouts:
    """Draws, rolls out and scores; the rollout of the next iteration may be under way (scoring.staleness).

    Args:
        family: The model, its weights ready.
        config: Of the run.
        world: The ranks that share an iteration's samples.
        prompts: What the sampler draws from.
        rewards: The rewards by name.
        timer: Times the phases.
        failures: Is told of rewards that fail.
        acting: A context entered around each rollout, in which weights stay whole; it gives the components that roll
            out, or None for the family's own.

    Raises:
        UserError: If the groups that best-of-N keeps whole do not divide over the ranks.
    """

    def __init__(
        self, family: ModelFamily, config: Config, world: World, prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward], timer: PhaseTimer, failures: FailureLog,
        acting: Acting,
    ) -> None:  # fmt: skip
        roll, steps = config.rollout, config.update.optimizer_steps
        self.config, self.world, self.prompts, self.timer, self.acting = config, world, prompts, timer, acting
        self.sampler = prompt_sampler(config, len(prompts))
        self.samples = roll.prompts_per_iteration * roll.candidates
        self.weights = np.array([spec.weight for spec in config.scored])
        shares = rank_samples(self.samples, steps, world.size, world.rank)
        if roll.best_of is not None and shares.shape[1] % roll.best_of:
            raise UserError(
                f"rollout.best_of: groups of {roll.best_of} stay whole, and {roll.prompts_per_iteration} prompts an "
                "iteration do not divide over the ranks × update.optimizer_steps"
            )
        # In the order of the optimizer steps that take them; one order on every rank.
        self.mine = np.sort(shares.reshape(-1))
        self.levels = levels_of(family, roll.steps, roll.shift)
        self.generator = Generator(
            family, config, rewards, self.mine, self.levels, failures, world.context, world.context_rank
        )
        # With staleness 1: the next iteration's samples, rolled out already.
        self._ahead: Batch | None = None

    def take(self, iteration: int) -> Batch:
        """Returns the batch of an iteration, rolled out; its scoring has begun."""
        batch = self._ahead or self._start(iteration)
        self._ahead = self._start(iteration + 1) if self.config.scoring.staleness else None
        return batch

    def collect(self, batch: Batch, stop: int = 0) -> AllScores:
        """Returns every rank's scores of a batch, as soon as they are there.

        Args:
            batch: As `take` gave it.
            stop: This rank's wish to stop, which the ranks exchange with their scores.
        """
        if batch.scored is None:
            self.generator.finish(batch, self.timer)
            with self.timer.phase("sync"):
                batch.scored = gather_scores(batch.scores, self._owned, self.world, self.generator.failures, stop)
        return batch.scored

    def kept(self, scored: AllScores) -> np.ndarray:
        """Returns bool [N]: the samples that are trained on, all or the best and worst of each prompt."""
        if self.config.rollout.best_of is None:
            return np.ones(self.samples, dtype=bool)
        return keep_extremes(scored.values, scored.valid, self.weights, np.arange(self.samples), self.config)

    def advantages(self, scored: AllScores) -> Advantages:
        """Returns the advantages of all global samples, 0 of those that are not trained on."""
        group, settings = self.config.rollout.candidates, self.config.advantage
        return compute_advantages(scored.values, scored.valid, group, self.weights, settings).of(self.kept(scored))

    def metrics(self, scored: AllScores) -> dict[str, float]:
        """Returns what metrics.jsonl has of an iteration's scores."""
        group, names = self.config.rollout.candidates, list(self.generator.rewards)
        components = scored.components
        return reward_metrics(scored.values, scored.valid, scored.asked, self.weights, names, components, group)

    def observe(self, batch: Batch, scored: AllScores) -> None:
        """Takes in the spread of each prompt's rewards, where it decides what is drawn next."""
        if isinstance(self.sampler, SpreadSampler):
            group = self.config.rollout.candidates
            self.sampler.observe(batch.drawn, group_spread(scored.values, scored.valid, group, self.weights))

    def failure(self, scored: AllScores, iteration: int) -> str | None:
        """Returns what is wrong where too many samples have no score to train on; None where enough have."""
        rate, limit = scored.failure_rate(self.weights), self.config.scoring.max_failure_rate
        if rate == 1:
            return f"rewards: no sample of iteration {iteration} could be scored"
        if rate <= limit:
            return None
        return (
            f"scoring.max_failure_rate: {rate:.0%} of iteration {iteration}'s samples got no score, and the limit is "
            f"{limit:.0%}"
        )

    def drop_ahead(self) -> None:
        """Forgets what was rolled out ahead; the next `take` rolls it out again."""
        self._ahead = None

    def state(self, stop: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns what a checkpoint keeps: plain data, and the tensors of samples rolled out ahead.

        Samples ahead of which too many failed are not kept: they are rolled out again. stop: as `collect` takes it.
        """
        data: dict[str, Any] = {"in_flight": None}
        if isinstance(self.sampler, SpreadSampler):
            data["prompt_spread"] = [None if np.isnan(x) else x for x in self.sampler.spread.tolist()]
        batch = self._ahead
        if batch is None or self.failure(self.collect(batch, stop), batch.iteration) is not None:
            return data, {}
        return data | {"in_flight": flight_state(batch, self.world.size)}, tensors(batch.trajectory)

    def restore(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Takes in the data of `state`. Returns the tensors, to be filled from the checkpoint."""
        if isinstance(self.sampler, SpreadSampler):
            # More prompts may have come at the end since.
            spread = np.array(state["prompt_spread"], dtype=np.float64)
            self.sampler.spread[: len(spread)] = spread
        flying = state["in_flight"]
        if flying is None:
            return {}
        scored = flight_scores(flying, self.world.size)
        batch = self.restored(flying["iteration"], np.array(flying["drawn"]), self.kept(scored))
        batch.scored, self._ahead = scored, batch
        return tensors(batch.trajectory)

    def restored(self, iteration: int, drawn: np.ndarray, kept: np.ndarray) -> Batch:
        """Returns an earlier batch of the kept samples (bool [N]) but for its tensors, which a checkpoint fills."""
        mine = self.mine[kept[self.mine]]
        prompts = [self.prompts[i] for i in drawn]
        return self.generator.restore(iteration, drawn, prompts, mine if len(mine) else self.mine[:1])

    def _start(self, iteration: int) -> Batch:
        drawn = self.sampler.at(iteration)
        prompts = [self.prompts[i] for i in drawn]
        return self.generator.start(iteration, drawn, prompts, self.timer, self.acting)

    def _owned(self, process: int) -> np.ndarray:
        """The samples that a process scores, in its order."""
        rank, context_rank = divmod(process, self.world.context)
        shares = rank_samples(self.samples, self.config.update.optimizer_steps, self.world.size, rank)
        return self.generator.scores_of(np.sort(shares, None), context_rank)
