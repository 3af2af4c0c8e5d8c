"""Held-out evaluation: deterministic samples from fixed noise, scored by the run's rewards, drawn as a grid.

What compares a run with its base stands in fastgrpo/evaluation/compare.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.layout import lay_out
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.data.samplers import PromptSampler
from fastgrpo.distributed.world import World
from fastgrpo.errors import UserError
from fastgrpo.models import ModelFamily
from fastgrpo.models.loading import levels_of
from fastgrpo.models.resized import resized
from fastgrpo.observe.media import animate, beside_sources, write_frames, write_grid, write_mp4, write_webp
from fastgrpo.rewards import Reward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import gather_scores, release_rewards, score_samples
from fastgrpo.rollout.decode import decode, synchronize
from fastgrpo.rollout.sampler import rollout

# Pictures and their prompts to what each reward sees in them.
Describe = Callable[[Tensor, Sequence[Prompt]], dict[str, list[str]]]
# The iteration word of an evaluation's noise keys: no training iteration reaches it.
EVAL_ITERATION = 2**31 - 1


@dataclass(frozen=True)
class Evaluation:
    """prompts: [n]; values: float64 [n] by reward and by `<reward>.<component>`, NaN where invalid;
    images: [n, 3, H, W], or videos [n, 3, F, H, W], on the host."""

    prompts: list[Prompt]
    values: dict[str, np.ndarray]
    images: Tensor

    def mean(self, name: str) -> float:
        return known_mean(self.values[name])

    def summary(self) -> dict[str, Any]:
        """Means by reward, the strict pass rate where a reward has one, and both by prompt category."""
        strict = next((name for name in self.values if name.endswith(".strict")), None)
        categories = np.array([str(p.metadata.get("category", "")) for p in self.prompts])
        by_category = {
            category: {name: known_mean(values[categories == category]) for name, values in self.values.items()}
            for category in sorted(set(categories) - {""})
        }
        return {
            "images": len(self.prompts),
            "rewards": {name: self.mean(name) for name in self.values},
            "strict_pass": None if strict is None else self.mean(strict),
            "by_category": by_category,
        }


def known_mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def heldout_prompts(config: Config, count: int, source: str | None = None) -> list[Prompt]:
    """`count` held-out prompts: whole seeded permutations of the set, so that every evaluation uses the same.

    source: another set than prompts.heldout.
    """
    source = source or config.prompts.heldout
    if source is None:
        raise UserError("prompts.heldout: an evaluation needs held-out prompts; name a file or set")
    prompts = load_prompts(source)
    sampler = PromptSampler(len(prompts), len(prompts), config.run.seed)
    order = np.concatenate([sampler.at(i) for i in range(-(-count // len(prompts)))])
    return [prompts[i] for i in order[:count]]


def draw(family: ModelFamily, prompts: Sequence[Prompt], config: Config, world: World, first: int = 0) -> Tensor:
    """Images of this rank's share of `prompts` ([ceil(n / world), 3, H, W]), deterministically from their noise.

    first: the number of the first image; the initial noise is a function of (seed, number).
    """
    share = -(-len(prompts) // world.size)
    mine = np.minimum(np.arange(world.rank * share, (world.rank + 1) * share), len(prompts) - 1)
    family = resized(family, config.evaluated_model, "eval")
    single = config.rollout.model_copy(update={"group_size": 1, "best_of": None, "shared_noise": False})
    levels = levels_of(family, config.eval.steps or config.rollout.steps, config.rollout.shift)
    schedule = schedule_steps(single, levels, first + len(prompts), EVAL_ITERATION, config.run.seed, deterministic=True)
    unique, back = np.unique(mine, return_inverse=True)
    layout = lay_out(schedule, single, first + unique)
    conditioning = family.encode([prompts[i] for i in unique])
    final = rollout(family, schedule, layout, conditioning, single, config.run.seed, EVAL_ITERATION).latents
    images = decode(family, final, config.rollout.decode_batch)
    synchronize(family.device)
    return images[torch.from_numpy(back)]


def evaluate(
    family: ModelFamily,
    rewards: Mapping[str, Reward],
    prompts: list[Prompt],
    config: Config,
    world: World,
    failures: FailureLog,
) -> Evaluation:
    """Draws and scores one sample of each prompt.

    Args:
        family: The model; its weights are used as they are.
        rewards: The rewards by their names.
        prompts: The prompts, the same on every rank.
        config: The run's config, whose `eval` section has steps, seed, size and guidance.
        world: The ranks that share the work.
        failures: Where a reward that fails is reported; its scores are NaN.

    Returns:
        The scores of all prompts on every rank, and the images of the rank's own share.
    """
    images = draw(family, prompts, config, world)
    share, last = len(images), len(prompts) - 1

    def owned(process: int) -> np.ndarray:
        begin = process // world.context * share
        return np.minimum(np.arange(begin, begin + share), last)

    mine = [prompts[i] for i in owned(world.process)]
    scores = score_samples(rewards, images, mine, config.model.fps if images.ndim == 5 else None, failures)
    release_rewards(rewards, failures)
    scored = gather_scores(scores, owned, world, failures)
    counted = np.where(scored.valid & scored.asked, scored.values, np.nan)
    columns = dict(zip(rewards, counted, strict=True)) | scored.components
    ordered = sorted(columns, key=lambda name: (list(rewards).index(_reward_of(name, rewards)), name))
    return Evaluation(prompts, {name: columns[name][: len(prompts)] for name in ordered}, images)


def _reward_of(column: str, rewards: Mapping[str, Reward]) -> str:
    """The reward whose column this is: itself, or `<reward>.<component>`."""
    return next(
        name for name in sorted(rewards, key=len, reverse=True) if column == name or column.startswith(f"{name}.")
    )


def record(
    evaluation: Evaluation, run_dir: Path, iteration: int, grid: int | Sequence[int], fps: float = 8.0,
    mp4: bool = False, describe: Describe | None = None,
) -> Path:  # fmt: skip
    """Writes `eval/<iteration>.json` and its sheet, PNG; gives the sheet's path.

    grid: how many pictures the sheet shows, or which, by their places; the JSON file has them under `shown`.
    describe: gives what rewards see in pictures, by reward; the JSON file has it under `seen`, of the pictures shown.
    Of videos the sheet shows frames in rows; beside it stands an animated grid, WebP, and with `mp4` the same as MP4.
    """
    directory = run_dir / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    shown = list(range(min(grid, len(evaluation.images)))) if isinstance(grid, int) else list(grid)
    images = evaluation.images[shown]
    path = directory / f"{iteration:06d}.png"
    pictures = {"grid": path.name}
    if images.ndim == 5:
        write_frames(images, path)
        frames = animate(images)
        write_webp(frames, path.with_suffix(".webp"), fps)
        pictures["video"] = path.with_suffix(".webp").name
        if mp4:
            write_mp4(frames, path.with_suffix(".mp4"), fps)
    else:
        chosen = [evaluation.prompts[place] for place in shown]
        pictures_of = beside_sources(chosen, images)
        write_grid(pictures_of, path, smallest=96 * pictures_of.shape[-1] // images.shape[-1])
    captions = [evaluation.prompts[place].text for place in shown]
    values = {name: [None if np.isnan(v) else float(v) for v in column] for name, column in evaluation.values.items()}
    data = {"iteration": iteration, **evaluation.summary(), "prompts": captions, "shown": shown, **pictures}
    data["values"] = values
    data["seen"] = {} if describe is None else describe(images, [evaluation.prompts[place] for place in shown])
    (directory / f"{iteration:06d}.json").write_text(json.dumps(data, indent=1))
    return path
