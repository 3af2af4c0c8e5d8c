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
from fastgrpo.models.base import Conditioning, ModelFamily
from fastgrpo.schedule import RolloutPlan
from fastgrpo_kernels import gaussian_step, noise


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

    latents: [n, *shape] float32 final latents. x: [R, *shape] float32 latents of each row. v_old: [R, *shape] model
    output of each row, compute dtype. noise: [M, *shape] of each pair, or None where it is drawn again from its key.
    """

    layout: Layout
    latents: Tensor
    x: Tensor
    v_old: Tensor
    noise: Tensor | None


def rank_samples(total: int, optimizer_steps: int, world: int, rank: int) -> np.ndarray:
    """[optimizer_steps, n] global samples of a rank; row k are those that its k-th optimizer step takes.

    Contiguous, so groups stay whole where the numbers divide; step k takes the same samples at any world size.
    """
    return np.arange(total).reshape(optimizer_steps, world, -1)[:, rank]


def lay_out(plan: RolloutPlan, rollout: Rollout, samples: np.ndarray) -> Layout:
    """The layout of the rank that rolls out `samples` (global, [n])."""
    prompts, sample_prompt = np.unique(samples // rollout.group_size, return_inverse=True)
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
    family: ModelFamily, x: Tensor, sigma: float, conditioning: Conditioning, row_prompt: np.ndarray, batch: int
) -> Tensor:
    """The model output of every row of x [R, *shape], evaluated in batches of exactly `batch` rows."""
    output = torch.empty(x.shape, dtype=family.dtype, device=x.device)
    level = torch.full((batch,), sigma, dtype=torch.float32, device=x.device)
    done = 0
    for index, real in forward_batches(np.arange(len(x)), batch):
        inputs = x[done : done + batch] if real == batch else x.index_select(0, to_device(index, x.device))
        rows = conditioning.rows(to_device(row_prompt[index], x.device))
        output[done : done + real] = family.predict(inputs, level, rows)[:real]
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
    keep_noise = config.noise == "keep" or (config.noise == "auto" and device.type == "cpu")
    x_kept = torch.empty((len(layout.row_step), *shape), device=device)
    v_kept = torch.empty((len(layout.row_step), *shape), dtype=family.dtype, device=device)
    noise_kept = torch.empty((len(layout.pair_row), *shape), device=device) if keep_noise else None

    # Before the group parts, a row of x is a prompt; after it, a sample.
    parted = not layout.shared
    row_prompt = layout.sample_prompt if parted else np.arange(len(layout.prompts))
    x = initial_noise(layout, config, shape, seed, iteration, device, parted)
    for step, (a, b, s) in enumerate(plan.transitions):
        v = predict_rows(family, x, plan.sigmas[step], conditioning, row_prompt, batch)
        rows = layout.rows_of(step)
        if rows.stop > rows.start:
            source = to_device(layout.row_source[rows], device)
            torch.index_select(x, 0, source, out=x_kept[rows])
            torch.index_select(v, 0, source, out=v_kept[rows])
        if not parted and step == plan.first_stochastic:
            spread = to_device(layout.sample_prompt, device)
            x, v, row_prompt, parted = x.index_select(0, spread), v.index_select(0, spread), layout.sample_prompt, True
        if s == 0:
            x = gaussian_step(x, v, a, b, s, None)
            continue
        key = noise.noise_key(seed, to_device(layout.samples, device), step, iteration, noise.STREAM_SDE, device)
        pairs = layout.pairs_of(step)
        if noise_kept is None or pairs.stop == pairs.start:
            x = gaussian_step(x, v, a, b, s, key)
            continue
        drawn = noise.normal(key, shape)
        torch.index_select(drawn, 0, to_device(layout.pair_sample[pairs], device), out=noise_kept[pairs])
        x = gaussian_step(x, v, a, b, s, drawn)
    return Trajectory(layout, x, x_kept, v_kept, noise_kept)


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
    """Images of latents [n, *shape], decoded in batches of exactly `batch`: [n, 3, H, W] in [0, 1]."""
    parts = []
    for index, real in forward_batches(np.arange(len(latents)), batch):
        parts.append(family.decode(latents.index_select(0, to_device(index, latents.device)))[:real])
    return torch.cat(parts)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a tensor on `device`, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
