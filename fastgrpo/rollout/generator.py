"""One iteration's samples of a rank: rolled out in chunks, each decoded and scored beside the next one's rollout; with
the best of N, only the extremes of each prompt kept.

Chunks change nothing but the clock: noise belongs to the sample, and a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.algorithms.advantages import extremes
from fastgrpo.algorithms.layout import Layout, lay_out, share_out, sharers
from fastgrpo.algorithms.schedule import NoiseLevels, StepSchedule, schedule_steps
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import UserError
from fastgrpo.models.conditioning import Conditioning, to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.observe.timers import PhaseTimer
from fastgrpo.rewards import Reward, Scores
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import AllScores, joined, release_rewards, score_samples
from fastgrpo.rollout.decode import decode, synchronize
from fastgrpo.rollout.sampler import rollout, sde_key
from fastgrpo.rollout.trajectory import Trajectory, empty_trajectory, kept_empty, select
from fastgrpo_kernels import noise


@dataclass
class Batch:
    """An iteration's samples: rolled out, and being scored until `Generator.finish`.

    drawn: indices of its prompts; trajectory: of the samples that are trained (global numbers: `layout.samples`);
    scores: of the samples that this rank scores, in order; scored: of every rank's, once they have been gathered.
    """

    iteration: int
    drawn: np.ndarray
    schedule: StepSchedule
    trajectory: Trajectory
    conditioning: Conditioning
    scores: dict[str, Scores] = field(default_factory=dict)
    jobs: list[tuple[Trajectory, Job]] = field(default_factory=list)
    scored: AllScores | None = None
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredChunk:
    """Scores of a chunk; and where they were found beside the rollout, the seconds it took, by metric."""

    scores: dict[str, Scores]
    seconds: dict[str, float] = field(default_factory=dict)


Job = Future[ScoredChunk]
# A context around a rollout: the components that act within it, or None for the family's own.
Acting = Callable[[], AbstractContextManager[Mapping[str, nn.Module] | None]]


class Generator:
    """Rolls out and scores; `mine`: this rank's global samples, ascending.

    context, context_rank: the ranks that roll out the same samples, each of which decodes and scores a share of them,
    and which of them this is. With the best of N each scores them all, because it chooses among them.
    """

    def __init__(
        self, family: ModelFamily, config: Config, rewards: Mapping[str, Reward], mine: np.ndarray,
        levels: NoiseLevels, failures: FailureLog, context: int = 1, context_rank: int = 0,
    ) -> None:  # fmt: skip
        self.family, self.config, self.rewards, self.mine = family, config, rewards, mine
        self.sharers = sharers(config.rollout, context)
        self.sharer = context_rank if self.sharers > 1 else 0
        self.levels, self.failures = levels, failures
        self.samples = config.rollout.prompts_per_iteration * config.rollout.candidates
        self.weights = np.array([spec.weight for spec in config.scored])
        settings = config.scoring
        self.beside = settings.staleness > 0 or (settings.chunks > 1 and settings.overlap)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring") if self.beside else None
        self._stream = torch.cuda.Stream(family.device) if self.beside and family.device.type == "cuda" else None
        # The most rows that were ever in memory.
        self.held_rows = 0

    def schedule(self, iteration: int) -> StepSchedule:
        return schedule_steps(
            self.config.rollout, self.levels, self.samples, iteration, self.config.run.seed,
            forward=self.config.objective.forward,
        )  # fmt: skip

    def start(
        self, iteration: int, drawn: np.ndarray, prompts: Sequence[Prompt], timer: PhaseTimer,
        acting: Acting = nullcontext,
    ) -> Batch:  # fmt: skip
        """Rolls out an iteration and gives its chunks to scoring; `acting` is entered around each rollout."""
        roll, schedule = self.config.rollout, self.schedule(iteration)
        whole = lay_out(schedule, roll, self.mine)
        with timer.phase("conditioning"):
            conditioning = self.family.encode([prompts[i] for i in whole.prompts])
        batch = Batch(iteration, drawn, schedule, empty_trajectory(self.family, whole), conditioning)
        chunks = self._chunks(self.mine)
        for samples in chunks:
            layout = whole if len(chunks) == 1 else lay_out(schedule, roll, samples)
            rows = conditioning
            if len(layout.prompts) < len(whole.prompts):
                rows = conditioning.rows(np.searchsorted(whole.prompts, layout.prompts))
            with timer.phase("rollout"), acting() as modules:
                trajectory = rollout(
                    self.family, schedule, layout, rows, roll, self.config.run.seed, iteration, modules=modules
                )
            texts = [prompts[i] for i in layout.prompts[layout.sample_prompt].tolist()]
            latents = trajectory.latents
            if self.sharers > 1:
                share = share_out(np.arange(len(texts)), self.sharers, self.sharer)
                latents = latents.index_select(0, to_device(share, latents.device))
                texts = [texts[i] for i in share]
            batch.jobs.append((trajectory, self._submit(latents, texts, iteration, timer)))
            if roll.best_of is not None:
                self._fold(batch, timer, leave=1 if self.beside else 0)
        return batch

    def _chunks(self, samples: np.ndarray) -> list[np.ndarray]:
        return np.array_split(samples, min(self.config.scoring.chunks, len(samples)))

    def scores_of(self, samples: np.ndarray, context_rank: int) -> np.ndarray:
        """Which of a rank's samples (global, ascending) it scores, in the order of its scores."""
        number = context_rank if self.sharers > 1 else 0
        return np.concatenate([share_out(chunk, self.sharers, number) for chunk in self._chunks(samples)])

    def finish(self, batch: Batch, timer: PhaseTimer) -> None:
        """Waits for a batch's scores and puts its trajectory together."""
        self._fold(batch, timer, leave=0)
        batch.conditioning = _narrowed(batch.conditioning, self.mine, batch.trajectory.layout, self.config)
        release_rewards(self.rewards, self.failures)

    def _submit(self, latents: Tensor, texts: list[Prompt], iteration: int, timer: PhaseTimer) -> Job:
        if self._thread is not None:
            rolled = None
            if self._stream is not None:
                rolled = torch.cuda.Event()
                rolled.record()
                latents.record_stream(self._stream)
            return self._thread.submit(self._score_chunk, latents, texts, iteration, rolled)
        with timer.phase("decode"):
            images = decode(self.family, latents, self.config.rollout.decode_batch)
        with timer.phase("sync"):
            synchronize(latents.device)
        with timer.phase("reward"):
            job: Job = Future()
            job.set_result(ScoredChunk(self._score(images, texts, iteration)))
        return job

    def _score_chunk(
        self, latents: Tensor, texts: list[Prompt], iteration: int, rolled: torch.cuda.Event | None
    ) -> ScoredChunk:
        """In the scoring thread, on a stream of its own: beside what the device rolls out meanwhile."""
        begin = perf_counter()
        beside = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.no_grad(), beside:
            if self._stream is not None and rolled is not None:
                self._stream.wait_event(rolled)
            images = decode(self.family, latents, self.config.rollout.decode_batch)
            synchronize(latents.device)
            decoded = perf_counter()
            scores = self._score(images, texts, iteration)
        seconds = {
            "scoring/decode_seconds": decoded - begin,
            "scoring/reward_seconds": perf_counter() - decoded,
        }
        return ScoredChunk(scores, seconds)

    def _score(self, images: Tensor, texts: list[Prompt], iteration: int) -> dict[str, Scores]:
        """Held-out rewards with `every` are asked in some iterations only."""
        fps = self.config.model.fps if images.ndim == 5 else None
        due = {s.key: s.weight != 0 or iteration % s.every == 0 for s in self.config.scored}
        asked = {name: reward for name, reward in self.rewards.items() if due[name]}
        scores = score_samples(asked, images, texts, fps, self.failures)
        return {name: scores.get(name) or Scores.not_asked(len(texts)) for name in self.rewards}

    def _fold(self, batch: Batch, timer: PhaseTimer, leave: int) -> None:
        """Takes in the scored chunks but the last `leave`: all their samples, or with best_of those that are kept."""
        done, batch.jobs = batch.jobs[: len(batch.jobs) - leave], batch.jobs[len(batch.jobs) - leave :]
        if not done:
            return
        with timer.phase("reward") if self.beside else nullcontext():
            chunks = [job.result() for _, job in done]
        first = not batch.scores
        for part in chunks:
            batch.scores = part.scores if not batch.scores else joined([batch.scores, part.scores])
            for name, seconds in part.seconds.items():
                batch.spent[name] = batch.spent.get(name, 0.0) + seconds
        parts = [trajectory for trajectory, _ in done] if first else [batch.trajectory, *(t for t, _ in done)]
        self.held_rows = max(self.held_rows, sum(len(t.x) for t in parts) + sum(len(t.x) for t, _ in batch.jobs))
        samples = np.sort(np.concatenate([t.layout.samples for t in parts]))
        if self.config.rollout.best_of is not None:
            samples = samples[self._extreme(batch, samples)]
        elif len(parts) == 1:
            batch.trajectory = parts[0]
            return
        batch.trajectory = select(batch.schedule, self.config, parts, samples)

    def _extreme(self, batch: Batch, samples: np.ndarray) -> np.ndarray:
        """Which of these samples (all scored) are among the best and worst of their prompts so far."""
        places = np.searchsorted(self.mine, samples)
        values = np.stack([s.values[places] for s in batch.scores.values()])
        valid = np.stack([s.valid[places] for s in batch.scores.values()])
        chosen = keep_extremes(values, valid, self.weights, samples, self.config)
        # A rank without any score still takes part in the update, by a row of weight 0.
        chosen[:1] |= not chosen.any()
        return chosen

    def restore(self, iteration: int, drawn: np.ndarray, prompts: Sequence[Prompt], samples: np.ndarray) -> Batch:
        """A batch of these trained samples as `start` and `finish` left it, but for `tensors`, which a checkpoint
        fills, and its noise, which is drawn again from its key."""
        roll, schedule, family = self.config.rollout, self.schedule(iteration), self.family
        layout = lay_out(schedule, roll, samples)
        conditioning = family.encode([prompts[i] for i in layout.prompts])
        trajectory = empty_trajectory(family, layout)
        rows, pairs, shape = len(layout.row_step), len(layout.pair_row), family.latent_shape
        trained_shape = family.policy_shape
        if self.config.objective.forward:
            trajectory.latents = torch.empty((len(samples), *shape), device=family.device)
            return Batch(iteration, drawn, schedule, trajectory, conditioning)
        trajectory.x = kept_empty(family, roll, (rows, *shape), torch.float32)
        trajectory.v_old = kept_empty(family, roll, (rows, *shape), family.dtype)
        if roll.old_values == "log_prob":
            trajectory.y = kept_empty(family, roll, (pairs, *trained_shape), torch.float32)
            trajectory.log_prob = torch.empty(pairs, device=family.device)
        elif roll.keeps_noise(family.device.type):
            trajectory.noise = kept_empty(family, roll, (pairs, *trained_shape), torch.float32)
            for step in range(schedule.steps):
                part = layout.pairs_of(step)
                if part.stop > part.start:
                    owners = to_device(layout.samples[layout.pair_sample[part]], family.device)
                    key = sde_key(roll, self.config.run.seed, owners, step, iteration)
                    trajectory.noise[part] = noise.normal(key, trained_shape)
        return Batch(iteration, drawn, schedule, trajectory, conditioning)


def flight_state(batch: Batch, ranks: int) -> dict[str, Any]:
    """A scored batch for a checkpoint's JSON: everything but its tensors."""
    scored = batch.scored
    assert scored is not None
    lists = {name: getattr(scored, name).tolist() for name in ("values", "valid", "asked")}
    components = {name: column.tolist() for name, column in scored.components.items()}
    return {
        "iteration": batch.iteration, "drawn": batch.drawn.tolist(), "ranks": ranks, **lists, "components": components
    }  # fmt: skip


def flight_scores(state: Mapping[str, Any], ranks: int) -> AllScores:
    """The scores of `flight_state`. Raises UserError where other ranks rolled it out."""
    if state["ranks"] != ranks:
        raise UserError(
            f"run.resume: the checkpoint holds samples in flight of {state['ranks']} ranks (scoring.staleness), and "
            f"there are {ranks}; go on with as many"
        )
    values, valid, asked = (np.array(state[name]) for name in ("values", "valid", "asked"))
    components = {name: np.array(column, np.float64) for name, column in state["components"].items()}
    return AllScores(values, valid, asked, components, 0)


def keep_extremes(
    values: np.ndarray, valid: np.ndarray, weights: np.ndarray, samples: np.ndarray, config: Config
) -> np.ndarray:
    """bool [n]: the group_size/2 best and as many worst of each prompt by the weighted sum of rewards [R, n].

    samples: global numbers. One that a trained reward could not score is not kept.
    """
    used = weights != 0
    total = np.tensordot(weights[used], np.where(valid, values, 0.0)[used], axes=1)
    total = np.where(valid[used].all(axis=0), total, np.nan)
    return extremes(total, samples // config.rollout.candidates, samples, config.rollout.group_size)


def _narrowed(conditioning: Conditioning, mine: np.ndarray, layout: Layout, config: Config) -> Conditioning:
    """The rows of the prompts that a trajectory still has; with the best of N, one may have lost all its samples."""
    every = np.unique(mine // config.rollout.candidates)
    have = len(next(iter(conditioning.values())))
    if have == len(layout.prompts):
        return conditioning
    return conditioning.rows(np.searchsorted(every, layout.prompts))
