"""The second stage: rectified flow (arXiv 2209.03003) or diffusion (arXiv 2006.11239) on the latents, from scratch.

Denoiser and text encoders learn jointly, through the same three verbs of a family that the trainer uses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.commands.pretrain.empty_channels import with_empty_channels
from fastgrpo.commands.pretrain.recipe import PretrainConfig, as_prompts
from fastgrpo.data.prompts import Prompt, world_prompts
from fastgrpo.distributed.shards import exchanged
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError
from fastgrpo.evaluation.heldout import Evaluation, evaluate
from fastgrpo.models import ModelFamily, family_class, load_family
from fastgrpo.models.loading import resolve_path
from fastgrpo.observe.media import beside_sources, write_frames, write_grid
from fastgrpo.observe.progress import Progress
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.shapes.world import eval_set
from fastgrpo.training.learning_rate import cosine_rate

ALONE = World(0, 1, torch.device("cpu"))

# Pictures rendered and encoded at once.
CHUNK = 1024


def open_family(pipeline: Any, config: PretrainConfig) -> ModelFamily:
    """The pipeline as its family, without a second branch: guidance without a classifier is not for training."""
    kind = family_class(config.family)
    scale = kind.unguided_scale if kind.guidance_style == "cfg" else config.denoiser.guidance
    return kind(pipeline, config.model(config.out, scale), ALONE.device)


def latent_pool(family: ModelFamily, config: PretrainConfig) -> tuple[dict[str, Tensor], list[Prompt]]:
    """Latents `x0` of `denoiser.pool` renders of training prompts; of what they start from too, where that is taken."""
    world, sizes = config.world, config.checked_sizes
    rng, generator = np.random.default_rng((config.seed, 1)), torch.Generator().manual_seed(config.seed)
    drawn = world.draw(world.prompts[0], config.denoiser.pool, rng, config.denoiser.shares)
    progress = Progress(len(drawn), unit="encoded sample")
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(drawn), CHUNK):
        first, pixels = world.render_pairs(drawn[start : start + CHUNK], rng, sizes)
        for place, part in enumerate(pixels.split(CHUNK // 4)):
            encoded = {"x0": family.encode_images(part, generator)}
            if family.image_encoding:
                assert first is not None
                encoded[family.image_encoding] = family.encode_images(first.split(CHUNK // 4)[place], generator)
            parts.append(encoded)
        progress.update(start + len(pixels), {})
    progress.close()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, as_prompts(drawn)


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of seeded permutations of the pool, without end."""
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % batch].split(batch)


def noised(family: ModelFamily, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x, time, target): latents at random noise levels, what the model is told, and what it should answer."""
    noise = torch.randn(x0.shape, generator=generator)
    shape = (-1,) + (1,) * (x0.ndim - 1)
    if family.paradigm == "flow":
        sigma = torch.randn(len(x0), generator=generator).sigmoid()
        shift = family.pipeline_shift() or 1.0
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return torch.lerp(x0, noise, sigma.view(shape)), sigma, noise - x0
    scheduler = family.sampling_scheduler("pipeline")
    time = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), generator=generator)
    x: Any = scheduler.add_noise(x0, noise, time)
    targets = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: scheduler.get_velocity(x0, noise, time),
    }
    return x, time.float(), targets[scheduler.config.prediction_type]()


def learned(family: ModelFamily) -> dict[str, nn.Module]:
    """What the second stage trains, by the pipeline's names: the denoiser and its text encoders."""
    parts = {name: getattr(family.pipeline, name, None) for name in (*family.trained, *family.encoders)}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


@torch.no_grad()
def start_from(parts: Mapping[str, nn.Module], path: str) -> None:
    """Gives the parts the weights that a pipeline directory has for them; rows that it lacks, such as those of new
    words, keep theirs. Raises ConfigError where the two do not fit."""
    for name, part in parts.items():
        found: Any = type(part).from_pretrained(resolve_path(path), subfolder=name, torch_dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
        state = part.state_dict()
        for key, value in found.state_dict().items():
            mine = state.get(key)
            if mine is None or mine.shape[1:] != value.shape[1:] or len(mine) < len(value):
                raise ConfigError(f"denoiser.init: {path} does not fit at {name}.{key}; give both the same sizes")
            mine[: len(value)] = value


def train(pipeline: Any, config: PretrainConfig) -> None:
    """Trains denoiser and text encoders in place; the pipeline ends with the EMA weights."""
    stage, generator = config.denoiser, torch.Generator().manual_seed(config.seed)
    family = open_family(pipeline, config)
    if stage.init is not None:
        start_from(learned(family), stage.init)
    pool, prompts = latent_pool(family, config)
    parameters = [p.requires_grad_(True) for part in learned(family).values() for p in part.parameters()]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=True
    )
    dropping = np.random.default_rng((config.seed, 3))
    progress, average_loss = Progress(stage.steps, unit="denoiser step"), torch.zeros(())
    for step, rows in zip(range(1, stage.steps + 1), batches(stage.pool, stage.batch, generator), strict=False):
        optimizer.param_groups[0]["lr"] = lr = cosine_rate(step - 1, stage.steps, stage.lr, stage.warmup)
        # Texts of one length side by side: where padding is not attended to, they are computed together.
        rows = torch.tensor(sorted(rows.tolist(), key=lambda i: len(prompts[i].text.split())))
        drop = dropping.random(len(rows)) < stage.drop
        asked = [
            replace(prompts[i], text="") if gone else prompts[i] for i, gone in zip(rows.tolist(), drop, strict=True)
        ]
        x0 = pool["x0"][rows]
        x, time, target = noised(family, x0, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16):
            encoded = family.encode_texts(asked) | {name: pool[name][rows] for name in pool if name != "x0"}
            predicted = family.predict(x, time, family.condition(encoded))
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(stage.ema_decay, step / (step + 10)))
        average_loss.lerp_(loss.detach(), max(0.01, 1 / step))
        progress.update(step, {"loss": average_loss, "lr": lr})
        if step % config.eval.every == 0 and step < stage.steps:
            with exchanged(parameters, averages):
                checkpoint(pipeline, config, step, config.eval.images)
    progress.close()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    checkpoint(pipeline, config, stage.steps, config.eval.final_images)


def measure(path: Path, config: PretrainConfig, n: int) -> Evaluation:
    """Deterministic samples of `n` held-out prompts by the pipeline in a directory, and their verdict."""
    settings = config.evaluation(str(path), config.denoiser.guidance)
    world = config.world
    chosen = eval_set(world.prompts[1], n, config.seed, world.categories)
    prompts = world_prompts(world.module, chosen)
    family = load_family(settings.model, ALONE.device)
    rewards = {world.reward: load_reward(settings.rewards[0])}
    return evaluate(family, rewards, prompts, settings, ALONE, FailureLog(print))


def save_bfloat16(pipeline: Any, path: Path) -> None:
    """Writes a bf16 copy of the pipeline as safetensors and JSON."""
    modules = {name: copy.deepcopy(m).bfloat16() for name, m in pipeline.components.items() if isinstance(m, nn.Module)}
    type(pipeline)(**{**pipeline.components, **modules}).save_pretrained(path, safe_serialization=True)


def checkpoint(pipeline: Any, config: PretrainConfig, step: int, n: int) -> None:
    """Writes the pipeline to `out`/step-N (the last one to `out`/final), evaluates what was written, logs the rates."""
    out = Path(config.out)
    path = out / ("final" if step == config.denoiser.steps else f"step-{step:06d}")
    save_bfloat16(with_empty_channels(pipeline, config) if config.empty_channels else pipeline, path)
    found = measure(path, config, n)
    (out / "grids").mkdir(exist_ok=True)
    if found.images.ndim == 5:
        write_frames(found.images[:96], out / "grids" / f"{path.name}.png")
    else:
        write_grid(beside_sources(found.prompts[:96], found.images[:96]), out / "grids" / f"{path.name}.png")
    strict = found.values[f"{config.world.reward}.strict"]
    categories = np.array([str(p.metadata["category"]) for p in found.prompts])
    rates = {"strict": float(strict.mean()), "score": float(found.values[config.world.reward].mean())}
    rates |= {name: float(strict[categories == name].mean()) for name in config.world.categories if name in categories}
    with (out / "eval.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "images": n, **rates}) + "\n")
    print(f"eval {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in rates.items()), flush=True)
