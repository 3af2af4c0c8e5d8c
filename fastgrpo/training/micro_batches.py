"""Which rows an update evaluates, and how they are cut into micro-batches of one shape: numbers on the host.

A row that a whole group shares is evaluated once, and read by all of its pairs. What is left over is padding of weight
0, so that every rank runs equally many micro-batches of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastgrpo.algorithms.layout import Layout, epoch_samples, lay_out
from fastgrpo.algorithms.schedule import StepSchedule
from fastgrpo.config import Config
from fastgrpo.distributed.world import World
from fastgrpo_kernels import noise


@dataclass(frozen=True)
class MicroBatch:
    """Host arrays: rows [F] to evaluate; pairs [F, W] that read each row; weight [F, W], 0 where there is none.

    module: which component evaluates them. syncs: its gradients are complete after this one. others: how many
    other policies evaluate the rows too, without gradients.
    """

    rows: np.ndarray
    pairs: np.ndarray
    weight: np.ndarray
    module: str = ""
    syncs: bool = False
    others: int = 0


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step is made of.

    Attributes:
        micro_batches: In their order; none where no sample of any rank is trained.
        loss: Gives the summed loss of a micro-batch and its `LossStatistics.values`, on the device.
        scale: What makes a mean of that sum: over the rows of a step where every group has a spread.
        movement: Gives the same as `loss` without the reference model, so that its `kl` is Q/2; None where that is not
            measured.
    """

    micro_batches: list[MicroBatch]
    loss: Callable[[MicroBatch], tuple[Tensor, Tensor]]
    scale: float
    movement: Callable[[MicroBatch], tuple[Tensor, Tensor]] | None = None


def micro_batches_of_step(
    config: Config, world: World, schedule: StepSchedule, layout: Layout, worth: np.ndarray, k: int,
    draw: Sequence[int] | None = None,
) -> list[MicroBatch]:  # fmt: skip
    """Returns the micro-batches of the k-th optimizer step, as many as the rank that needs the most.

    Args:
        config: Of the run.
        world: This rank among its peers.
        schedule: The steps of the iteration.
        layout: What this rank rolled out.
        worth: Which of all global samples are trained, bool [N].
        k: Counts from 0.
        draw: The seed by which an epoch divides the samples over optimizer steps; None: the first one.
    """
    roll, steps, size = config.rollout, config.update.optimizer_steps, config.rollout.forward_batch
    ranks = []
    for rank in range(world.size):
        samples = epoch_samples(len(worth), steps, world.size, rank, roll.candidates, draw)
        theirs = layout if rank == world.rank else lay_out(schedule, roll, np.sort(samples.reshape(-1)))
        ranks.append((theirs, worth[theirs.samples] & np.isin(theirs.samples, samples[k])))
    chosen = []
    # A component's rows stand together, so that every rank runs the same components in the same order.
    for module in dict.fromkeys(schedule.modules):
        acts = np.array([name == module for name in schedule.modules])
        needed = max(rows_to_train(theirs, kept, acts) for theirs, kept in ranks)
        _, mine = ranks[world.rank]
        chosen += micro_batches(layout, mine, size, -(-needed // size), module, acts)
    return chosen


def epoch_draw(config: Config, iteration: int, epoch: int) -> list[int] | None:
    """The seed by which an epoch divides an iteration's samples over its optimizer steps; None for the first one."""
    return [config.run.seed, noise.STREAM_SUBSET, iteration, epoch] if epoch else None


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
