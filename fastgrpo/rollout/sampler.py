"""Prompts -> trajectories: batched, at one constant forward shape, with a group's common prefix evaluated once.

Noise belongs to the sample: its key is (run seed; step and stream, global sample, iteration), so a sample is the
same whatever rank, batch or order draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.algorithms.layout import Layout
from fastgrpo.algorithms.schedule import StepSchedule
from fastgrpo.config import Rollout
from fastgrpo.models.conditioning import Conditioning, to_device
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.rollout.trajectory import Trajectory, keep_rows, kept_empty
from fastgrpo_kernels import gaussian_step, log_prob, noise


def forward_batches(index: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`index` in batches of exactly `size`, the last one padded by repeating its end; and how many are real."""
    for start in range(0, len(index), size):
        places = np.minimum(np.arange(start, start + size), len(index) - 1)
        yield index[places], min(size, len(index) - start)


def batch_rows(x: Tensor, index: np.ndarray, real: int) -> Tensor:
    """The rows of x at a batch of consecutive places: a view, but where it is padded."""
    return x[index[0] : index[0] + real] if real == len(index) else x.index_select(0, to_device(index, x.device))


def predict_rows(
    family: ModelFamily, x: Tensor, time: float, module: str, conditioning: Conditioning, row_prompt: np.ndarray,
    batch: int, predict: Callable[..., Tensor] | None = None, modules: Mapping[str, nn.Module] | None = None,
) -> Tensor:  # fmt: skip
    """The output of a component for every row of x [R, *shape], evaluated in batches of exactly `batch` rows.

    predict: evaluates a batch in place of `family.predict`; the memory plan counts with it. modules: the components
    that act in place of the family's.
    """
    predict = predict or family.predict
    output = torch.empty(x.shape, dtype=family.dtype, device=x.device)
    times = torch.full((batch,), time, dtype=torch.float32, device=x.device)
    model = (modules or family.modules)[module]
    done = 0
    for index, real in forward_batches(np.arange(len(x)), batch):
        inputs, rows = batch_rows(x, index, real), conditioning.rows(row_prompt[index])
        # Compiled blocks have other code, of other bits, where nothing is differentiated: here the update's runs.
        with torch.set_grad_enabled(family.config.compile == "blocks"):
            predicted = predict(inputs, times, rows, model).detach()
        output[done : done + real] = predicted[:real]
        done += real
    return output


@torch.no_grad()
def rollout(
    family: ModelFamily,
    schedule: StepSchedule,
    layout: Layout,
    conditioning: Conditioning,
    config: Rollout,
    seed: int,
    iteration: int,
    predict: Callable[..., Tensor] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> Trajectory:
    """Samples every local sample of `layout` from noise to its final latents, keeping what its trained steps need.

    conditioning: rows of the local prompts, [u]. predict: evaluates the model in place of `family.predict`. modules:
    the components that act in place of the family's. Reads nothing back to the host.
    """
    device, shape, batch = family.device, family.latent_shape, config.forward_batch
    trained, trained_shape = family.of_policy, family.policy_shape
    subtract = config.old_values == "log_prob"
    keep_noise = not subtract and config.keeps_noise(device.type)
    rows_kept, pairs_kept = (len(layout.row_step), *shape), (len(layout.pair_row), *trained_shape)
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
    for step, (a, b, s) in enumerate(schedule.transitions):
        v = predict_rows(
            family, x, schedule.times[step], schedule.modules[step], conditioning, row_prompt, batch, predict, modules
        )
        rows = layout.rows_of(step)
        if rows.stop > rows.start:
            source = to_device(layout.row_source[rows], device)
            keep_rows(x_kept[rows], x, source)
            keep_rows(v_kept[rows], v, source)
        if not parted and step == schedule.first_stochastic:
            spread = to_device(layout.sample_prompt, device)
            x, v, row_prompt, parted = x.index_select(0, spread), v.index_select(0, spread), layout.sample_prompt, True
        if s == 0:
            x, clean = deterministic_step(x, v, schedule, step, clean)
            continue
        key = sde_key(config, seed, to_device(layout.samples, device), step, iteration)
        pairs = layout.pairs_of(step)
        chosen = to_device(layout.pair_sample[pairs], device) if pairs.stop > pairs.start else None
        drawn: Tensor | noise.NoiseKey = key
        if noise_kept is not None and chosen is not None:
            drawn = noise.normal(key, trained_shape)
            keep_rows(noise_kept[pairs], drawn, chosen)
        y = gaussian_step(trained(x), trained(v), a, b, s, drawn)
        if y_kept is not None and log_prob_kept is not None and chosen is not None:
            keep_rows(y_kept[pairs], y, chosen)
            before, output, after = (part.index_select(0, chosen) for part in (trained(x), trained(v), y))
            log_prob_kept[pairs] = log_prob(before, output, after, a, b, s)
        x = y if not family.beside else torch.cat([y, step_beside(family, schedule, step, x, v)], dim=1)
    return Trajectory(layout, x, x_kept, v_kept, noise_kept, y_kept, log_prob_kept)


def sde_key(config: Rollout, seed: int, samples: Tensor, step: int | Tensor, iteration: int) -> noise.NoiseKey:
    """The noise that the samples' (global ids, int64 [n]) stochastic transitions add at a step, or each at its own."""
    stream, device = noise.STREAM_SDE, samples.device
    return noise.noise_key(seed, samples, step, iteration, stream, device, antithetic=config.antithetic)


def step_beside(family: ModelFamily, schedule: StepSchedule, step: int, x: Tensor, v: Tensor) -> Tensor:
    """What is denoised beside the trained latents, after a step that is stochastic for these and Euler's for it."""
    part = slice(x.shape[1] - family.beside, None)
    return gaussian_step(x[:, part].contiguous(), v[:, part].contiguous(), 1.0, -(schedule.gaps[step] ** 2), 0.0, None)


def deterministic_step(
    x: Tensor, v: Tensor, schedule: StepSchedule, step: int, previous: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Latents after a step without noise, and the clean sample predicted at it, where the next step is of second order.

    previous: the clean sample predicted at the step before, where this one is of second order.
    """
    a, b, _ = schedule.transitions[step]
    weight, needed = schedule.second_order[step], step + 1 < schedule.steps and schedule.second_order[step + 1] != 0
    if not (weight or needed):
        return gaussian_step(x, v, a, b, 0.0, None), None
    taken = gaussian_step(x, v, a, b, 0.0, None, return_all=True, clean=schedule.clean[step])
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
