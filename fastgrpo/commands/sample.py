"""Images of a run's weights, or of its base model's, for prompts of one's own; the best of many where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgrpo.commands.runs import apply_checkpoint, choose_rewards, make_results, open_run
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, available, is_named, load_prompts
from fastgrpo.distributed.world import World
from fastgrpo.errors import UserError
from fastgrpo.evaluation.heldout import draw
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.observe.media import write_samples
from fastgrpo.rewards import Reward, load_reward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import score_samples

# Images in memory at a time while the best of many are looked for.
CHUNK = 64


def sample_run(
    run_dir: str | Path,
    prompts: Sequence[str],
    out_dir: str | Path,
    count: int = 1,
    seed: int | None = None,
    checkpoint: str = "latest",
    mp4: bool = False,
    best_of: int | None = None,
    rewards: Sequence[str] = (),
    note: Callable[[str], None] = print,
) -> list[Path]:
    """Writes `count` samples of each prompt, deterministically drawn, and gives their paths.

    An image is a PNG; a video an animated WebP, or with `mp4` an MP4.

    prompts: texts, or one source of `load_prompts`. seed: of the initial noise, the run's by default; image i of two
    checkpoints starts from the same noise. checkpoint: latest, best, an iteration, or base. best_of: the `count` best
    of so many, the best first, by the weighted sum of `rewards` (see `choose_rewards`); their scores are written to
    `scores.json`. Raises UserError where fewer than `count` of a prompt's samples could be scored.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    wanted = _prompts(prompts)
    if best_of is not None and best_of < count:
        raise UserError(f"--best-of: the {count} best of {best_of} are more than there are; lower --count")
    if rewards and best_of is None:
        raise UserError("--reward: chooses among several samples; say of how many with --best-of")
    config, store, iteration = open_run(run_dir, "latest" if checkpoint == "base" else checkpoint)
    if seed is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    specs = choose_rewards(config, rewards) if best_of is not None else []
    scorers = {spec.key: (spec.weight, load_reward(spec)) for spec in specs if spec.weight}
    make_results(out_dir)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    family = load_family(config.model, world.device)
    if checkpoint != "base":
        apply_checkpoint(family, config, store, iteration)
    if best_of is None:
        images = draw(family, [p for p in wanted for _ in range(count)], config, world)
    else:
        images, chosen = _best(family, wanted, config, world, scorers, best_of, count, note)
        (out_dir / "scores.json").write_text(json.dumps(chosen, indent=1))
    names = [f"{i // count:04d}-{i % count:02d}" for i in range(len(images))]
    return write_samples(images, out_dir, names, config.model.fps, mp4)


def scored_chunks(
    family: ModelFamily, prompts: Sequence[Prompt], config: Config, world: World, rewards: dict[str, Reward],
    samples: int, note: Callable[[str], None],
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, np.ndarray]]]:  # fmt: skip
    """Numbers, images and scores of `samples` of each prompt, CHUNK at a time; image n is of prompt n // samples.

    scores: [chunk] by reward, NaN where there is none.
    """
    total, failures = len(prompts) * samples, FailureLog(note)
    for start in range(0, total, CHUNK):
        numbers = np.arange(start, min(start + CHUNK, total))
        of = [prompts[n // samples] for n in numbers.tolist()]
        images = draw(family, of, config, world, first=start)
        scores = score_samples(rewards, images, of, config.model.fps if images.ndim == 5 else None, failures)
        yield numbers, images, {name: np.where(s.counted, s.values, np.nan) for name, s in scores.items()}


def _best(
    family: ModelFamily, prompts: Sequence[Prompt], config: Config, world: World,
    scorers: dict[str, tuple[float, Reward]], best_of: int, count: int, note: Callable[[str], None],
) -> tuple[Tensor, list[dict]]:  # fmt: skip
    """The best `count` images of each prompt, and what was scored; no more than those and a chunk are kept."""
    kept: list[list[tuple[float, int, Tensor]]] = [[] for _ in prompts]
    rewards = {name: reward for name, (_, reward) in scorers.items()}
    for numbers, images, scores in scored_chunks(family, prompts, config, world, rewards, best_of, note):
        total = np.sum([weight * scores[name] for name, (weight, _) in scorers.items()], axis=0)
        for place, number in enumerate(numbers):
            if not np.isnan(total[place]):
                mine = kept[number // best_of]
                mine.append((float(total[place]), int(number % best_of), images[place]))
                mine.sort(key=lambda item: (-item[0], item[1]))
                del mine[count:]
    for prompt, mine in zip(prompts, kept, strict=True):
        if len(mine) < count:
            raise UserError(f"--best-of: only {len(mine)} of {best_of} samples of '{prompt.text}' could be scored")
    chosen = [
        {"prompt": p.text, "scores": [s for s, _, _ in mine], "samples": [n for _, n, _ in mine], "of": best_of}
        for p, mine in zip(prompts, kept, strict=True)
    ]
    return torch.stack([image for mine in kept for _, _, image in mine]), chosen


def _prompts(given: Sequence[str]) -> list[Prompt]:
    """Texts as they are; one that names a source is read as it."""
    return [p for text in given for p in (load_prompts(text) if _is_source(text) else [Prompt(text)])]


def _is_source(text: str) -> bool:
    return Path(text).suffix in available() or is_named(text)
