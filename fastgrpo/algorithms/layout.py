"""Which rows a rank evaluates, which pairs read them, and which samples are whose: numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.algorithms.schedule import StepSchedule
from fastgrpo.config import Rollout


@dataclass(frozen=True)
class Layout:
    """Which rows a rank evaluates with gradients later, and which (sample, step) pairs read them; host arrays.

    A row is one model evaluation. Where a group shares its noise, the first stochastic step has one row a prompt,
    read by the pairs of the whole group; everywhere else a row has one pair. Rows and pairs are ordered by step.
    """

    samples: np.ndarray  # [n] global sample of each local one
    prompts: np.ndarray  # [u] global prompt slot of each local prompt
    sample_prompt: np.ndarray  # [n] local prompt of each local sample
    shared: bool
    row_step: np.ndarray  # [R]
    row_source: np.ndarray  # [R] local prompt (where shared) or local sample whose latents the row holds
    row_prompt: np.ndarray  # [R] local prompt
    pair_row: np.ndarray  # [M]
    pair_sample: np.ndarray  # [M] local sample

    def rows_of(self, step: int) -> slice:
        return slice(*np.searchsorted(self.row_step, [step, step + 1]))

    def pairs_of(self, step: int) -> slice:
        return slice(*np.searchsorted(self.row_step[self.pair_row], [step, step + 1]))


def rank_samples(total: int, optimizer_steps: int, world: int, rank: int) -> np.ndarray:
    """Returns the global indices of the samples that `rank` owns, [optimizer_steps, n]; row k is used by step k.

    They are contiguous, so groups stay whole where the numbers divide. Step k uses the same samples at any world size.
    """
    return np.arange(total).reshape(optimizer_steps, world, -1)[:, rank]


def epoch_samples(
    total: int, optimizer_steps: int, world: int, rank: int, group: int, draw: Sequence[int] | None
) -> np.ndarray:
    """`rank_samples` of an epoch: the samples of a rank, [optimizer_steps, n], divided otherwise over the steps.

    Each place within a step keeps its samples, one of every step, and draws which step takes which: so a rank trains
    what it rolled out, a step takes the same samples at any world size, and whole groups stay whole.

    Args:
        total, optimizer_steps, world, rank: As `rank_samples` has them.
        group: Samples of a group.
        draw: The seed of the epoch's draw; None: the first epoch, in which nothing is exchanged.
    """
    every = np.arange(total).reshape(optimizer_steps, -1)
    if draw is not None:
        places = every.shape[1]
        unit = group if places % group == 0 else 1
        order = np.argsort(np.random.default_rng(draw).random((optimizer_steps, places // unit)), axis=0)
        every = np.take_along_axis(every, order.repeat(unit, axis=1), axis=0)
    return every.reshape(optimizer_steps, world, -1)[:, rank]


def sharers(rollout: Rollout, context: int) -> int:
    """Of the ranks of a context group, which have the same samples, how many score a share each. With the best of N all
    score everything (1), because each chooses among them."""
    return context if rollout.best_of is None else 1


def share_out(samples: np.ndarray, processes: int, number: int) -> np.ndarray:
    """The share of one of so many processes that hold the same samples; all shares are as long, the last sample being
    repeated where they do not divide."""
    share = -(-len(samples) // processes)
    return samples[np.minimum(np.arange(number * share, (number + 1) * share), len(samples) - 1)]


def lay_out(schedule: StepSchedule, rollout: Rollout, samples: np.ndarray) -> Layout:
    """The layout of the rank that rolls out `samples` (global, [n])."""
    prompts, sample_prompt = np.unique(samples // rollout.candidates, return_inverse=True)
    shared = rollout.shared_noise and rollout.share_prefix and schedule.first_stochastic < schedule.steps
    row_step, row_source, row_prompt, pair_row, pair_sample = [], [], [], [], []
    for step in range(schedule.steps):
        chosen = np.flatnonzero(schedule.trained[step, samples])
        common = shared and step == schedule.first_stochastic
        source, reads = (
            np.unique(sample_prompt[chosen], return_inverse=True) if common else (chosen, np.arange(len(chosen)))
        )
        pair_row.append(reads + sum(map(len, row_step)))
        pair_sample.append(chosen)
        row_step.append(np.full(len(source), step))
        row_source.append(source)
        row_prompt.append(source if common else sample_prompt[source])
    joined = [np.concatenate(parts) for parts in (row_step, row_source, row_prompt, pair_row, pair_sample)]
    return Layout(samples, prompts, sample_prompt, shared, *joined)
