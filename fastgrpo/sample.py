"""Images of a run's weights, or of its base model's, for prompts of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastgrpo.evaluate import apply_checkpoint, draw, open_run
from fastgrpo.models import load_family
from fastgrpo.parallel import World
from fastgrpo.pictures import write_samples
from fastgrpo.prompts import Prompt, load_prompts


def sample_run(
    run_dir: str | Path,
    prompts: Sequence[str],
    out_dir: str | Path,
    count: int = 1,
    seed: int | None = None,
    checkpoint: str = "latest",
    mp4: bool = False,
) -> list[Path]:
    """Writes `count` samples of each prompt, deterministically drawn, and gives their paths.

    An image is a PNG; a video an animated WebP, or with `mp4` an MP4.

    prompts: texts, or one source of `load_prompts`. seed: of the initial noise, the run's by default; image i of two
    checkpoints starts from the same noise. checkpoint: latest, best, an iteration, or base.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    wanted = _prompts(prompts)
    config, store, iteration = open_run(run_dir, "latest" if checkpoint == "base" else checkpoint)
    if seed is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    family = load_family(config.model, world.device)
    if checkpoint != "base":
        apply_checkpoint(family, config, store, iteration)
    images = draw(family, [p for p in wanted for _ in range(count)], config, world)
    names = [f"{i // count:04d}-{i % count:02d}" for i in range(len(images))]
    return write_samples(images, out_dir, names, config.model.fps, mp4)


def _prompts(given: Sequence[str]) -> list[Prompt]:
    """Texts as they are; one that names a source is read as it."""
    return [p for text in given for p in (load_prompts(text) if _is_source(text) else [Prompt(text)])]


def _is_source(text: str) -> bool:
    return text.startswith(("shapes:", "moving:", "hf:")) or Path(text).suffix in (".txt", ".jsonl", ".csv")
