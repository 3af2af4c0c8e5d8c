"""The tensors that an update needs from a rollout, and how its rows are kept and taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.layout import Layout, lay_out
from fastgrpo.algorithms.schedule import StepSchedule
from fastgrpo.config import Config, Rollout
from fastgrpo.models.conditioning import to_device
from fastgrpo.models.protocol import ModelFamily


@dataclass
class Trajectory:
    """The tensors that an update needs from a rollout, and the final latents.

    With `rollout.trajectory: host`, everything except `latents` and `log_prob` is kept in host memory.

    Attributes:
        layout: The rows and pairs of the tensors.
        latents: Final latents, float32 [n, *shape].
        x: Latents of each row, float32 [R, *shape].
        v_old: Model output of each row, compute dtype [R, *shape].
        noise: Noise of each pair, float32 [M, *shape]; None where it is drawn again from its key.
        y: Latents after each pair's step, float32 [M, *shape]; only with `rollout.old_values: log_prob`.
        log_prob: Log-probability of `y`, float32 [M]; only with `rollout.old_values: log_prob`.
    """

    layout: Layout
    latents: Tensor
    x: Tensor
    v_old: Tensor
    noise: Tensor | None
    y: Tensor | None = None
    log_prob: Tensor | None = None


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


def tensors(trajectory: Trajectory) -> dict[str, Tensor]:
    """What a checkpoint keeps of a trajectory."""
    named = {"x": trajectory.x, "v_old": trajectory.v_old, "y": trajectory.y, "log_prob": trajectory.log_prob}
    if not len(trajectory.x):
        # A forward process keeps no steps.
        named = {"latents": trajectory.latents}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def select(schedule: StepSchedule, config: Config, parts: Sequence[Trajectory], samples: np.ndarray) -> Trajectory:
    """The trajectory of `samples` (global, ascending), each of which is in one of the parts."""
    layout = lay_out(schedule, config.rollout, samples)
    rows = _places(_row_keys(layout, schedule), [_row_keys(p.layout, schedule) for p in parts])
    pairs = _places(_pair_keys(layout), [_pair_keys(p.layout) for p in parts])

    def of(name: str, places: tuple[np.ndarray, np.ndarray]) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else _collected(found, places)

    x, v_old = of("x", rows), of("v_old", rows)
    assert x is not None
    assert v_old is not None
    # Of no more use to an update that trains the steps of trajectories.
    latents = parts[0].latents[:0]
    if config.objective.forward:
        places = _places(samples, [p.layout.samples for p in parts])
        latents = _collected([p.latents for p in parts], places)
    return Trajectory(layout, latents, x, v_old, of("noise", pairs), of("y", pairs), of("log_prob", pairs))


def _row_keys(layout: Layout, schedule: StepSchedule) -> np.ndarray:
    """A number [R] for each row: its step, and the prompt or the sample that it is of."""
    common = layout.shared & (layout.row_step == schedule.first_stochastic)
    owner = np.where(common, layout.prompts[layout.row_prompt], -1)
    owner[~common] = layout.samples[layout.row_source[~common]]
    return layout.row_step * 2**40 + owner


def _pair_keys(layout: Layout) -> np.ndarray:
    return layout.row_step[layout.pair_row] * 2**40 + layout.samples[layout.pair_sample]


def _places(wanted: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each wanted key: which part has it (the first that does), and where in it."""
    keys = np.concatenate(parts)
    part = np.arange(len(parts)).repeat([len(p) for p in parts])
    place = np.concatenate([np.arange(len(p)) for p in parts])
    distinct, first = np.unique(keys, return_index=True)
    found = first[np.searchsorted(distinct, wanted)]
    assert np.array_equal(keys[found], wanted)
    return part[found], place[found]


def _collected(parts: Sequence[Tensor], places: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Rows of several tensors, in order."""
    part, place = places
    device = parts[0].device
    out = torch.empty(
        (len(part), *parts[0].shape[1:]), dtype=parts[0].dtype, device=device, pin_memory=parts[0].is_pinned()
    )
    for number, tensor in enumerate(parts):
        here = np.flatnonzero(part == number)
        if len(here):
            rows = tensor.index_select(0, to_device(place[here], device))
            out.index_copy_(0, to_device(here, device), rows)
    return out


def empty_trajectory(family: ModelFamily, layout: Layout) -> Trajectory:
    """A trajectory without rows yet."""
    empty = torch.empty((0, *family.latent_shape), device=family.device)
    return Trajectory(layout, empty, empty, empty.to(family.dtype), None)
