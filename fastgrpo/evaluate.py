"""Held-out evaluation: deterministic samples from fixed noise, scored by the run's rewards, drawn as a grid.

`fastgrpo eval RUN` compares the base model with a run's checkpoint on the same prompts and the same initial noise.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo import __version__
from fastgrpo.checkpoint import CheckpointStore, load_weights
from fastgrpo.config import Config, load_config
from fastgrpo.errors import UserError
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.parallel import World
from fastgrpo.pictures import animate, write_frames, write_grid, write_mp4, write_webp
from fastgrpo.prompts import Prompt, PromptSampler, load_prompts
from fastgrpo.rewards import Reward, load_reward, release
from fastgrpo.rollout import decode, lay_out, rollout
from fastgrpo.schedule import plan_rollout

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
        return float(np.nanmean(self.values[name]))

    def summary(self) -> dict[str, Any]:
        """Means by reward, the strict pass rate where a reward has one, and both by prompt category."""
        strict = next((name for name in self.values if name.endswith(".strict")), None)
        categories = np.array([str(p.metadata.get("category", "")) for p in self.prompts])
        by_category = {
            category: {name: float(np.nanmean(values[categories == category])) for name, values in self.values.items()}
            for category in sorted(set(categories) - {""})
        }
        return {
            "images": len(self.prompts),
            "rewards": {name: self.mean(name) for name in self.values},
            "strict_pass": None if strict is None else self.mean(strict),
            "by_category": by_category,
        }


def heldout_prompts(config: Config, count: int) -> list[Prompt]:
    """`count` held-out prompts: whole seeded permutations of the set, so that every evaluation uses the same."""
    if config.prompts.heldout is None:
        raise UserError("prompts.heldout: an evaluation needs held-out prompts; name a file or set")
    prompts = load_prompts(config.prompts.heldout)
    sampler = PromptSampler(len(prompts), len(prompts), config.run.seed)
    order = np.concatenate([sampler.at(i) for i in range(-(-count // len(prompts)))])
    return [prompts[i] for i in order[:count]]


def draw(family: ModelFamily, prompts: Sequence[Prompt], config: Config, world: World) -> Tensor:
    """Images of this rank's share of `prompts` ([ceil(n / world), 3, H, W]), deterministically from their noise."""
    share = -(-len(prompts) // world.size)
    mine = np.minimum(np.arange(world.rank * share, (world.rank + 1) * share), len(prompts) - 1)
    single = config.rollout.model_copy(update={"group_size": 1, "shared_noise": False})
    levels = family.noise_levels(config.eval.steps or config.rollout.steps, config.rollout.shift)
    plan = plan_rollout(single, levels, len(prompts), EVAL_ITERATION, config.run.seed, deterministic=True)
    unique, back = np.unique(mine, return_inverse=True)
    layout = lay_out(plan, single, unique)
    conditioning = family.encode([prompts[i] for i in unique])
    final = rollout(family, plan, layout, conditioning, single, config.run.seed, EVAL_ITERATION).latents
    images = decode(family, final, config.rollout.decode_batch)
    return images.cpu()[torch.from_numpy(back)]


def evaluate(
    family: ModelFamily, rewards: dict[str, Reward], prompts: list[Prompt], config: Config, world: World
) -> Evaluation:
    """Draws and scores `prompts`; every rank gets the whole result, the images of its own share only."""
    images = draw(family, prompts, config, world)
    share = len(images)
    mine = [prompts[min(world.rank * share + i, len(prompts) - 1)] for i in range(share)]
    values = {}
    for name, reward in rewards.items():
        scores = reward.score(images, mine, config.model.fps if images.ndim == 5 else None)
        values[name] = np.where(scores.counted, scores.values, np.nan)
        values |= {f"{name}.{component}": numbers for component, numbers in scores.components.items()}
    release(rewards.values())
    everyone = {name: world.gather(numbers).reshape(-1)[: len(prompts)] for name, numbers in values.items()}
    return Evaluation(prompts, everyone, images)


def record(
    evaluation: Evaluation, run_dir: Path, iteration: int, grid: int, fps: float = 8.0, mp4: bool = False
) -> Path:
    """Writes `eval/<iteration>.json` and its sheet, PNG; gives the sheet's path.

    Of videos the sheet shows frames in rows; beside it stands an animated grid, WebP, and with `mp4` the same as MP4.
    """
    directory = run_dir / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    images = evaluation.images[: min(grid, len(evaluation.images))]
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
        write_grid(images, path)
    captions = [p.text for p in evaluation.prompts[: len(images)]]
    values = {name: [None if np.isnan(v) else float(v) for v in column] for name, column in evaluation.values.items()}
    data = {"iteration": iteration, **evaluation.summary(), "prompts": captions, **pictures, "values": values}
    (directory / f"{iteration:06d}.json").write_text(json.dumps(data, indent=1))
    return path


def paired_interval(difference: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """The bootstrap 95% interval of the mean of paired differences [n]."""
    rng = np.random.default_rng(seed)
    means = rng.choice(difference, (draws, len(difference))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def evaluate_run(run_dir: str | Path, images: int = 480, checkpoint: str = "latest") -> dict[str, Any]:
    """Base against tuned on held-out prompts, same initial noise; writes and gives `run_dir/summary.json`.

    checkpoint: latest, best, or an iteration. Raises UserError where the run holds no such checkpoint.
    """
    run_dir = Path(run_dir)
    config, store, iteration = open_run(run_dir, checkpoint)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = heldout_prompts(config, images)
    rewards = {spec.key: load_reward(spec) for spec in config.scored}
    state = store.state(iteration)

    family = load_family(config.model, world.device)
    base = evaluate(family, rewards, prompts, config, world)
    record(base, run_dir / "final", 0, config.eval.grid, config.model.fps, config.eval.mp4)
    apply_checkpoint(family, config, store, iteration)
    tuned = evaluate(family, rewards, prompts, config, world)
    record(tuned, run_dir / "final", iteration, config.eval.grid, config.model.fps, config.eval.mp4)

    differences = {}
    for name in base.values:
        both = ~(np.isnan(base.values[name]) | np.isnan(tuned.values[name]))
        gain = tuned.values[name][both] - base.values[name][both]
        differences[name] = {"mean": float(gain.mean()), "interval95": paired_interval(gain)}
    summary = {
        "base": base.summary(),
        "tuned": tuned.summary(),
        "difference": differences,
        "iteration": iteration,
        "train_seconds": state["train_seconds"],
        "seed": config.run.seed,
        "versions": versions(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def open_run(run_dir: Path, checkpoint: str = "latest") -> tuple[Config, CheckpointStore, int]:
    """A run's resolved config, its checkpoints, and the iteration that `checkpoint` names."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run directory (it has no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    store = CheckpointStore.of_run(run_dir)
    there = store.iterations()
    if not there:
        raise UserError(f"{run_dir}: holds no checkpoint yet")
    if checkpoint == "latest":
        return config, store, there[-1]
    if checkpoint == "best":
        best = store.state(there[-1])["best_iteration"]
        return config, store, there[-1] if best not in there else best
    if not checkpoint.isdigit() or int(checkpoint) not in there:
        raise UserError(
            f"{run_dir}: no checkpoint '{checkpoint}'; (one of: latest, best, {', '.join(map(str, there))})"
        )
    return config, store, int(checkpoint)


def apply_checkpoint(family: ModelFamily, config: Config, store: CheckpointStore, iteration: int) -> None:
    """Puts a checkpoint's weights (its EMA where eval.ema and there is one) into a freshly loaded family."""
    store.state(iteration)
    family.make_trainable()
    load_weights(family.policy, store, iteration, config.eval.ema and config.update.ema_decay is not None)
    family.policy.requires_grad_(False)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import diffusers
    import transformers

    return {
        "fastgrpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
