"""Prompts -> trajectories: batched, at one constant forward shape, with a group's common prefix evaluated once.

Noise belongs to the sample: its key is (run seed; step and stream, global sample, iteration), so a sample is the
same whatever rank, batch or order draws it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import Rollout
from fastgrpo.models.base import ModelFamily
from fastgrpo.models.conditioning import Conditioning, to_device
from fastgrpo.schedule import RolloutPlan
from fastgrpo_kernels import gaussian_step, log_prob, noise


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


@dataclass
class Trajectory:
    """What an update needs of a rollout, and its final latents.

    All but the latents and log_prob on the host with rollout.trajectory host. latents: [n, *shape] float32 final
    latents. x: [R, *shape] float32 latents of each row. v_old: [R, *shape] model
    output of each row, compute dtype. noise: [M, *shape] of each pair, or None where it is drawn again from its key.
    y, log_prob: with old_values log_prob, the latents after each pair's step [M, *shape] and their log-probability [M],
    float32; the noise is not kept then.
    """

    layout: Layout
    latents: Tensor
    x: Tensor
    v_old: Tensor
    noise: Tensor | None
    y: Tensor | None = None
    log_prob: Tensor | None = None


def rank_samples(total: int, optimizer_steps: int, world: int, rank: int) -> np.ndarray:
    """[optimizer_steps, n] global samples of a rank; row k are those that its k-th optimizer step takes.

    Contiguous, so groups stay whole where the numbers divide; step k takes the same samples at any world size.
    """
    return np.arange(total).reshape(optimizer_steps, world, -1)[:, rank]


def sharers(rollout: Rollout, context: int) -> int:
    """Of the ranks of a context group, which have the same samples, how many score a share each. With the best of N all
    score everything (1), because each chooses among them."""
    return context if rollout.best_of is None else 1


def share_out(samples: np.ndarray, processes: int, number: int) -> np.ndarray:
    """The share of one of so many processes that hold the same samples; all shares are as long, the last sample being
    repeated where they do not divide."""
    share = -(-len(samples) // processes)
    return samples[np.minimum(np.arange(number * share, (number + 1) * share), len(samples) - 1)]


def lay_out(plan: RolloutPlan, rollout: Rollout, samples: np.ndarray) -> Layout:
    """The layout of the rank that rolls out `samples` (global, [n])."""
    prompts, sample_prompt = np.unique(samples // rollout.candidates, return_inverse=True)
    shared = rollout.shared_noise and rollout.share_prefix and bool(plan.trained.any())
    row_step, row_source, row_prompt, pair_row, pair_sample = [], [], [], [], []
    for step in range(plan.steps):
        chosen = np.flatnonzero(plan.trained[step, samples])
        common = shared and step == plan.first_stochastic
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


def forward_batches(index: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`index` in batches of exactly `size`, the last one padded by repeating its end; and how many are real."""
    for start in range(0, len(index), size):
        part = index[start : start + size]
        yield np.pad(part, (0, size - len(part)), mode="edge"), len(part)


def predict_rows(
    family: ModelFamily, x: Tensor, time: float, module: str, conditioning: Conditioning, row_prompt: np.ndarray,
    batch: int,
) -> Tensor:  # fmt: skip
    """The output of a component for every row of x [R, *shape], evaluated in batches of exactly `batch` rows."""
    output = torch.empty(x.shape, dtype=family.dtype, device=x.device)
    times = torch.full((batch,), time, dtype=torch.float32, device=x.device)
    model = family.modules[module]
    done = 0
    for index, real in forward_batches(np.arange(len(x)), batch):
        inputs = x[done : done + batch] if real == batch else x.index_select(0, to_device(index, x.device))
        rows = conditioning.rows(row_prompt[index])
        output[done : done + real] = family.predict(inputs, times, rows, model)[:real]
        done += real
    return output


@torch.no_grad()
def rollout(
    family: ModelFamily,
    plan: RolloutPlan,
    layout: Layout,
    conditioning: Conditioning,
    config: Rollout,
    seed: int,
    iteration: int,
) -> Trajectory:
    """Samples every local sample of `layout` from noise to its final latents, keeping what its trained steps need.

    conditioning: rows of the local prompts, [u]. Reads nothing back to the host.
    """
    device, shape, batch = family.device, family.latent_shape, config.forward_batch
    subtract = config.old_values == "log_prob"
    keep_noise = not subtract and config.keeps_noise(device.type)
    rows_kept, pairs_kept = (len(layout.row_step), *shape), (len(layout.pair_row), *shape)
    x_kept = kept_empty(family, config, rows_kept, torch.float32)
    v_kept = kept_empty(family, config, rows_kept, family.dtype)
    noise_kept = kept_empty(family, config, pairs_kept, torch.float32) if keep_noise else None
    y_kept = kept_empty(family, config, pairs_kept, torch.float32) if subtract else None
    log_prob_kept = torch.empty(len(layout.pair_row), device=device) if subtract else None

    # Before the group parts, a row of x is a prompt; after it, a sample.
    parted = not layout.shared
    row_prompt = layout.sample_prompt if parted else np.arange(len(layout.prompts))
    x = initial_noise(layout, config, shape, seed, iteration, device, parted)
    clean: Tensor | None = None
    for step, (a, b, s) in enumerate(plan.transitions):
        v = predict_rows(family, x, plan.times[step], plan.modules[step], conditioning, row_prompt, batch)
        rows = layout.rows_of(step)
        if rows.stop > rows.start:
            source = to_device(layout.row_source[rows], device)
            keep_rows(x_kept[rows], x, source)
            keep_rows(v_kept[rows], v, source)
        if not parted and step == plan.first_stochastic:
            spread = to_device(layout.sample_prompt, device)
            x, v, row_prompt, parted = x.index_select(0, spread), v.index_select(0, spread), layout.sample_prompt, True
        if s == 0:
            x, clean = deterministic_step(x, v, plan, step, clean)
            continue
        key = noise.noise_key(seed, to_device(layout.samples, device), step, iteration, noise.STREAM_SDE, device)
        pairs = layout.pairs_of(step)
        chosen = to_device(layout.pair_sample[pairs], device) if pairs.stop > pairs.start else None
        drawn: Tensor | noise.NoiseKey = key
        if noise_kept is not None and chosen is not None:
            drawn = noise.normal(key, shape)
            keep_rows(noise_kept[pairs], drawn, chosen)
        y = gaussian_step(x, v, a, b, s, drawn)
        if y_kept is not None and log_prob_kept is not None and chosen is not None:
            keep_rows(y_kept[pairs], y, chosen)
            log_prob_kept[pairs] = log_prob(
                x.index_select(0, chosen), v.index_select(0, chosen), y.index_select(0, chosen), a, b, s
            )
        x = y
    return Trajectory(layout, x, x_kept, v_kept, noise_kept, y_kept, log_prob_kept)


def kept_empty(family: ModelFamily, config: Rollout, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of a trajectory without values, where rollout.trajectory says."""
    if config.trajectory == "host":
        return family.host_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=family.device)


def keep_rows(kept: Tensor, x: Tensor, index: Tensor) -> None:
    """Rows of x into `kept`, on the device or on the host, without waiting."""
    if kept.device.type == x.device.type:
        torch.index_select(x, 0, index, out=kept)
    else:
        kept.copy_(x.index_select(0, index), non_blocking=True)


def take_rows(kept: Tensor, index: np.ndarray, on_device: Tensor) -> Tensor:
    """Rows of a part of a trajectory on the device, without waiting; their numbers on the host, and on the device."""
    if kept.device.type == on_device.device.type:
        return kept.index_select(0, on_device)
    taken = torch.empty((len(index), *kept.shape[1:]), dtype=kept.dtype, device=on_device.device)
    for place, row in enumerate(index.tolist()):
        taken[place].copy_(kept[row], non_blocking=True)
    return taken


def deterministic_step(
    x: Tensor, v: Tensor, plan: RolloutPlan, step: int, previous: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Latents after a step without noise, and the clean sample predicted at it, where the next step is of second order.

    previous: the clean sample predicted at the step before, where this one is of second order.
    """
    a, b, _ = plan.transitions[step]
    weight, needed = plan.second_order[step], step + 1 < plan.steps and plan.second_order[step + 1] != 0
    if not (weight or needed):
        return gaussian_step(x, v, a, b, 0.0, None), None
    taken = gaussian_step(x, v, a, b, 0.0, None, return_all=True, clean=plan.clean[step])
    y, clean = taken.latents, taken.clean
    assert clean is not None
    if weight:
        assert previous is not None
        y.add_(clean - previous, alpha=weight)
    return y, clean if needed else None


def initial_noise(
    layout: Layout,
    config: Rollout,
    shape: tuple[int, ...],
    seed: int,
    iteration: int,
    device: torch.device,
    parted: bool,
) -> Tensor:
    """Initial latents, float32: [n, *shape], or [u, *shape] while a group has them in common (`parted` False).

    With shared_noise the key names the prompt's slot, else the sample.
    """
    owner = layout.prompts if config.shared_noise else layout.samples
    drawn = noise.normal(
        noise.noise_key(seed, to_device(owner, device), 0, iteration, noise.STREAM_INITIAL, device), shape
    )
    return drawn.index_select(0, to_device(layout.sample_prompt, device)) if config.shared_noise and parted else drawn


def decode(family: ModelFamily, latents: Tensor, batch: int) -> Tensor:
    """Images of latents [n, *shape], decoded in batches of exactly `batch`: [n, 3, H, W] in [0, 1], in host memory.

    On a GPU their copies may still be under way: the host synchronizes before it reads them.
    """
    images: Tensor | None = None
    done = 0
    with family.on_device("vae"):
        for index, real in forward_batches(np.arange(len(latents)), batch):
            part = family.decode(latents.index_select(0, to_device(index, latents.device)))[:real]
            if images is None:
                images = family.host_empty((len(latents), *part.shape[1:]), part.dtype)
            images[done : done + real].copy_(part, non_blocking=True)
            done += real
    assert images is not None
    return images


def synchronize(device: torch.device) -> None:
    """The host waits for this thread's stream: once an iteration, before it reads the images."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
