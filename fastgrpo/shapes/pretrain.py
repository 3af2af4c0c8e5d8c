"""Pretrains the tiny FLUX: an autoencoder, then rectified flow (arXiv 2209.03003) on its latents, from scratch.

`python -m fastgrpo.shapes.pretrain configs/pretrain-shapes-flux.yaml` writes a pipeline directory to `out`/final.
Only prompts of the training split are drawn; held-out prompts are for evaluation alone.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import diffusers.utils.logging
import numpy as np
import torch
import torch.nn.functional as F
import transformers.utils.logging
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastgrpo.errors import ConfigError, UserError, nearest
from fastgrpo.settings import Section, dump_settings, load_settings
from fastgrpo.shapes import render, verifier, world
from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline


class AutoencoderConfig(Section):
    """The first stage: mean absolute error plus a small KL term, on fresh renders."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    kl_weight: float = Field(ge=0)
    bfloat16: bool


class FlowConfig(Section):
    """The second stage: transformer and text encoders jointly, on a pool of encoded renders."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    pool: int = Field(ge=1)
    guidance: float = Field(ge=0)
    # How often a category is drawn, relative to the others; 1 where none is given.
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "FlowConfig":
        for name in self.shares:
            if name not in world.CATEGORIES:
                raise ConfigError(
                    f"flow.shares.{name}: unknown category; {nearest(name, world.CATEGORIES)}"
                    f"(one of: {', '.join(world.CATEGORIES)})"
                )
        return self


class EvalConfig(Section):
    """Deterministic sampling of held-out prompts, every so many steps of the second stage and at its end."""

    every: int = Field(ge=1)
    images: int = Field(ge=1)
    final_images: int = Field(ge=1)
    steps: int = Field(ge=1)


class PretrainConfig(Section):
    """Every setting of a pretraining run."""

    seed: int
    threads: int = Field(ge=1)
    out: str
    init: str | None = None  # a pipeline directory of an earlier run, whose autoencoder is taken as it is
    sizes: TinyFluxSizes = TinyFluxSizes()
    autoencoder: AutoencoderConfig
    flow: FlowConfig
    eval: EvalConfig


def images_to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Progress:
    """Prints a line at most every 30 seconds."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps = stage, steps
        self.start = self.last = time.perf_counter()

    def __call__(self, step: int, **values: Tensor | float) -> None:
        now = time.perf_counter()
        if now - self.last < 30 and step < self.steps:
            return
        self.last = now
        text = "  ".join(f"{k} {float(v):.4g}" for k, v in values.items())
        print(f"{self.stage} {step}/{self.steps}  {now - self.start:.0f} s  {text}", flush=True)


def draw_prompts(
    prompts: Sequence[world.ShapesPrompt], n: int, rng: np.random.Generator, shares: Mapping[str, float] | None = None
) -> list[world.ShapesPrompt]:
    """`n` random prompts: a category as often as its share of all shares (1 unless given), its prompts evenly."""
    members = [[p for p in prompts if p.category == c] for c in world.CATEGORIES]
    if shares is None:
        categories = rng.integers(len(members), size=n)
    else:
        weights = np.array([shares.get(c, 1.0) for c in world.CATEGORIES])
        categories = rng.choice(len(members), size=n, p=weights / weights.sum())
    return [members[c][int(rng.integers(len(members[c])))] for c in categories]


def train_autoencoder(vae: AutoencoderKL, config: PretrainConfig) -> None:
    """Trains `vae` in place on fresh renders and sets its scaling and shift factors to normalise the latents."""
    stage, prompts = config.autoencoder, world.split()[0]
    rng, generator = np.random.default_rng((config.seed, 0)), torch.Generator().manual_seed(config.seed)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    progress = Progress("autoencoder", stage.steps)
    for step in range(stage.steps):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, stage.steps, stage.lr, stage.warmup)
        batch = draw_prompts(prompts, stage.batch, rng)
        pixels = images_to_tensor(render.render_batch(batch, rng, config.sizes.image_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16):
            posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            decoded = vae.decode(posterior.sample(generator)).sample  # pyright: ignore[reportAttributeAccessIssue]
        error = (decoded.float() - pixels).abs().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        (error + stage.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, error=error.detach(), kl=kl.detach())
    batch = draw_prompts(prompts, 4096, rng)
    latents = encode(vae, render.render_batch(batch, rng, config.sizes.image_size), generator)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, generator: torch.Generator) -> Tensor:
    """A posterior sample of each image, normalised by the VAE's factors: [N, C, h, w]."""
    parts = []
    for start in range(0, len(images), 256):
        pixels = images_to_tensor(images[start : start + 256])
        parts.append(vae.encode(pixels).latent_dist.sample(generator))  # pyright: ignore[reportAttributeAccessIssue]
    latents = torch.cat(parts)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor  # pyright: ignore


@torch.no_grad()
def reconstruction_strict(vae: AutoencoderKL, config: PretrainConfig, n: int) -> float:
    """Strict pass rate of `n` renders of held-out prompts after encoding and decoding."""
    rng, generator = np.random.default_rng((config.seed, 2)), torch.Generator().manual_seed(config.seed)
    prompts = draw_prompts(world.split()[1], n, rng)
    latents = encode(vae, render.render_batch(prompts, rng, config.sizes.image_size), generator)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor  # pyright: ignore
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(256)])  # pyright: ignore
    return float(verifier.verify((decoded / 2 + 0.5).clamp(0, 1), prompts).strict.mean())


class Policy(nn.Module):
    """What the second stage trains: transformer, CLIP and T5 of a pipeline, from token ids to velocity."""

    def __init__(self, pipeline: FluxPipeline, guidance: float) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
        self.guidance = guidance

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity [B, S, C] at packed latents `x` [B, S, C] and noise level `sigma` [B]."""
        side = math.isqrt(x.shape[1])
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=sigma,
            guidance=x.new_full((len(x),), self.guidance),
            txt_ids=x.new_zeros(t5_ids.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, x.device, x.dtype),
            return_dict=False,
        )[0]


def latent_pool(pipeline: FluxPipeline, config: PretrainConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed latents and token ids of `flow.pool` renders of training prompts."""
    rng = np.random.default_rng((config.seed, 1))
    prompts = draw_prompts(world.split()[0], config.flow.pool, rng, config.flow.shares)
    progress, latents = Progress("encoding", len(prompts)), []
    for start in range(0, len(prompts), 1024):
        images = render.render_batch(prompts[start : start + 1024], rng, config.sizes.image_size)
        latents.append(encode(pipeline.vae, images, generator))
        progress(start + len(images))
    x0 = torch.cat(latents)
    texts = [p.text for p in prompts]
    length = config.sizes.text_length
    ids = [
        tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return {"x0": FluxPipeline._pack_latents(x0, *x0.shape), "clip_ids": ids[0], "t5_ids": ids[1]}


def _batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % batch].split(batch)


def train_flow(pipeline: FluxPipeline, config: PretrainConfig) -> None:
    """Trains transformer and text encoders in place; the pipeline ends with the EMA weights."""
    stage, generator = config.flow, torch.Generator().manual_seed(config.seed)
    pool = latent_pool(pipeline, config, generator)
    ema = Policy(pipeline, stage.guidance).requires_grad_(False)
    policy = copy.deepcopy(ema).requires_grad_(True)
    parameters: list[Tensor] = [*policy.parameters()]
    averages: list[Tensor] = [*ema.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=True
    )
    progress, average_loss = Progress("flow", stage.steps), torch.zeros(())
    for step, rows in zip(range(1, stage.steps + 1), _batches(stage.pool, stage.batch, generator), strict=False):
        optimizer.param_groups[0]["lr"] = lr = cosine_lr(step - 1, stage.steps, stage.lr, stage.warmup)
        x0 = pool["x0"][rows]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.randn(len(x0), generator=generator).sigmoid()
        sigma = config.sizes.shift * sigma / (1 + (config.sizes.shift - 1) * sigma)
        velocity = policy(
            torch.lerp(x0, noise, sigma[:, None, None]), sigma, pool["clip_ids"][rows], pool["t5_ids"][rows]
        )
        loss = F.mse_loss(velocity, noise - x0)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, parameters, 1 - min(stage.ema_decay, step / (step + 10)))
        average_loss.lerp_(loss.detach(), max(0.01, 1 / step))
        progress(step, loss=average_loss, lr=lr)
        if step % config.eval.every == 0 and step < stage.steps:
            checkpoint(pipeline, config, step, config.eval.images)
    checkpoint(pipeline, config, stage.steps, config.eval.final_images)


@torch.no_grad()
def evaluate(pipeline: FluxPipeline, config: PretrainConfig, n: int) -> tuple[dict[str, float], Tensor]:
    """Strict pass by category and images [n, 3, H, W] of `n` held-out prompts, by Euler steps from fixed noise."""
    prompts = world.eval_set(world.split()[1], n, config.seed)
    size, generator, parts = config.sizes.image_size, torch.Generator().manual_seed(config.seed), []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, n, 96):
        parts.append(
            pipeline(
                [p.text for p in prompts[start : start + 96]],
                height=size,
                width=size,
                num_inference_steps=config.eval.steps,
                guidance_scale=config.flow.guidance,
                max_sequence_length=config.sizes.text_length,
                generator=generator,
                output_type="pt",
            ).images  # pyright: ignore[reportAttributeAccessIssue]
        )
    images = torch.cat(parts).float()
    result = verifier.verify(images, prompts)
    rates = {"strict": float(result.strict.mean()), "score": float(result.score.mean())}
    for category in world.CATEGORIES:
        rates[category] = float(result.strict[[p.category == category for p in prompts]].mean())
    return rates, images


def save_grid(images: Tensor, path: Path, columns: int = 12, zoom: int = 3) -> None:
    """Writes images [N, 3, H, W] in 0..1 as one PNG, row by row."""
    n, _, h, w = images.shape
    rows = n // columns
    grid = (
        images[: rows * columns]
        .reshape(rows, columns, 3, h, w)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * h, columns * w, 3)
    )
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((columns * w * zoom, rows * h * zoom), Image.Resampling.NEAREST).save(path)


def save_bfloat16(pipeline: FluxPipeline, path: Path) -> None:
    """Writes a bf16 copy of the pipeline as safetensors and JSON."""
    modules = {name: copy.deepcopy(m).bfloat16() for name, m in pipeline.components.items() if isinstance(m, nn.Module)}
    FluxPipeline(**{**pipeline.components, **modules}).save_pretrained(path, safe_serialization=True)


def checkpoint(pipeline: FluxPipeline, config: PretrainConfig, step: int, n: int) -> None:
    """Writes the pipeline to `out`/step-N (the last one to `out`/final), evaluates what was written, logs the rates."""
    out = Path(config.out)
    path = out / ("final" if step == config.flow.steps else f"step-{step:06d}")
    save_bfloat16(pipeline, path)
    rates, images = evaluate(FluxPipeline.from_pretrained(path, torch_dtype=torch.float32), config, n)
    save_grid(images[:96], out / "grids" / f"{path.name}.png")
    with (out / "eval.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "images": n, **rates}) + "\n")
    print(f"eval {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in rates.items()), flush=True)


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the recipe of a YAML file; returns the directory of the finished pipeline."""
    config = load_settings(PretrainConfig, config_path, overrides)
    torch.set_num_threads(config.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_settings(config))
    pipeline = build_pipeline(world.vocabulary(), config.sizes, config.seed)
    if config.init is not None:
        vae = AutoencoderKL.from_pretrained(config.init, subfolder="vae", torch_dtype=torch.float32)
        pipeline.vae.load_state_dict(vae.state_dict())
        factors = {name: vae.config[name] for name in ("scaling_factor", "shift_factor")}
        pipeline.vae.register_to_config(**factors)
    else:
        train_autoencoder(pipeline.vae, config)
        # The second stage learns the latents of the weights that are shipped.
        pipeline.vae.bfloat16().float()
        save_bfloat16(pipeline, out / "autoencoder")
    print(f"reconstructions: strict {reconstruction_strict(pipeline.vae, config, 1200):.4f}", flush=True)
    train_flow(pipeline, config)
    return out / "final"


if __name__ == "__main__":
    try:
        print(main(sys.argv[1], sys.argv[2:]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
