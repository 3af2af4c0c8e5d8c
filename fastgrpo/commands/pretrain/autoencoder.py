"""The first stage: a variational autoencoder on fresh renders (arXiv 1312.6114), for images and for videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.auto_model import AutoModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgrpo.commands.pretrain.recipe import PretrainConfig
from fastgrpo.errors import ConfigError
from fastgrpo.models.loading import resolve_path
from fastgrpo.observe.progress import Progress
from fastgrpo.rewards import load_reward
from fastgrpo.training.learning_rate import cosine_rate

# Pictures encoded or decoded at once.
CHUNK = 256


def train(vae: Any, config: PretrainConfig) -> None:
    """Trains `vae` in place on fresh renders and sets its config's factors, so that its latents are normalised."""
    stage, world, sizes = config.autoencoder, config.world, config.checked_sizes
    assert stage is not None
    if stage.inflate is not None:
        inflate(vae, stage.inflate)
    rng, generator = np.random.default_rng((config.seed, 0)), torch.Generator().manual_seed(config.seed)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    progress = Progress(stage.steps, unit="autoencoder step")
    for step in range(stage.steps):
        optimizer.param_groups[0]["lr"] = cosine_rate(step, stage.steps, stage.lr, stage.warmup)
        pixels = as_input(vae, world.render(world.draw(world.prompts[0], stage.batch, rng), rng, sizes))
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        difference = decoded.float() - pixels
        error = difference.abs().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        (error + stage.squared_weight * difference.square().mean() + stage.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(step + 1, {"error": error.detach(), "kl": kl.detach()})
    progress.close()
    pixels = world.render(world.draw(world.prompts[0], 16 * CHUNK // getattr(sizes, "frames", 1), rng), rng, sizes)
    normalise(vae, raw_latents(vae, pixels, generator))


@torch.no_grad()
def inflate(vae: Any, path: str) -> None:
    """Starts a video autoencoder from an image pipeline's, of the same channels (arXiv 1705.07750).

    A convolution's last tap in time, the present, is the image's kernel, the others are zero: a latent frame shows the
    last frame it stands for, but for padding and for statistics over all frames where the image's has its own. Latent
    channels beyond the image's keep a third of their random start, with little noise. Raises
    ConfigError where the two do not fit.
    """
    image: Any = AutoencoderKL.from_pretrained(resolve_path(path), subfolder="vae", torch_dtype=torch.float32)
    few, many, state = image.config.latent_channels, vae.config.latent_channels, vae.state_dict()
    # Of the encoder's last convolution: means, then log-variances.
    moments = [*range(few), *range(many, many + few)]
    for name, value in image.state_dict().items():
        stem, leaf = name.rsplit(".", 1)
        start = state.get(f"{stem}.conv.{leaf}", state.get(name))
        rows = moments if stem == "encoder.conv_out" else list(range(len(value)))
        place = (rows, slice(value.shape[1])) if value.ndim > 1 else rows
        if start is None or few > many or max(rows) >= len(start) or start[place].shape[:2] != value.shape[:2]:
            raise ConfigError(f"autoencoder.inflate: {path} does not fit at {name}; give both the same channels")
        start.mul_(1 / 3)
        if stem == "encoder.conv_out":
            start[many + few :] = -4.0 if leaf == "bias" else 0.0
        start[place] = F.pad(value.unsqueeze(2), (0, 0, 0, 0, start.shape[2] - 1, 0)) if value.ndim > 1 else value
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(convolution.bias)
        convolution.weight.copy_(torch.eye(len(convolution.weight))[:, :, None, None, None])


@torch.no_grad()
def raw_latents(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A posterior sample of each picture (0..1), as the VAE gives it."""
    parts = [vae.encode(as_input(vae, part)).latent_dist.sample(generator) for part in pixels.split(CHUNK)]
    return torch.cat(parts)


def as_input(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures in 0..1 as the VAE takes them: −1..1, an image as a video of one frame where the VAE is for videos."""
    of_videos = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    return (pixels.unsqueeze(2) if of_videos and pixels.ndim == 4 else pixels) * 2 - 1


def normalise(vae: Any, latents: Tensor) -> None:
    """Sets what the VAE has for it, so that pipelines see latents of mean 0 (where it can) and deviation 1."""
    if isinstance(getattr(vae, "bn", None), nn.BatchNorm2d):
        # FLUX.2's: the statistics of each channel of a patch, those of a pixel beside each other.
        patches = F.pixel_unshuffle(latents, vae.config.patch_size[0])
        vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
        vae.bn.running_var.copy_(patches.var((0, 2, 3)))
        return
    if vae.config.get("latents_mean") is not None:
        dims = [d for d in range(latents.ndim) if d != 1]
        vae.register_to_config(latents_mean=latents.mean(dims).tolist(), latents_std=latents.std(dims).tolist())
        return
    shift = vae.config.get("shift_factor")
    centre = latents.mean().item() if shift is not None else 0.0
    spread = (latents - centre).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=1 / spread, **({} if shift is None else {"shift_factor": centre}))


def take(vae: Any, config: PretrainConfig) -> None:
    """Takes the autoencoder of the pipeline directory `init`, of this class or of another with the same layers.

    What normalises its latents is taken too where both have the same for it, and measured on fresh renders otherwise.
    Raises ConfigError where the two do not fit.
    """
    assert config.init is not None
    found: Any = AutoModel.from_pretrained(resolve_path(config.init), subfolder="vae", torch_dtype=torch.float32)
    taken = found.state_dict()
    statistics = {name: value for name, value in vae.state_dict().items() if name.startswith("bn.")}
    try:
        vae.load_state_dict(statistics | taken)
    except RuntimeError:
        raise ConfigError(f"init: the autoencoder of {config.init} does not fit; give both the same sizes") from None
    names = [n for n in ("scaling_factor", "shift_factor", "latents_mean", "latents_std") if n in vae.config]
    same = all((vae.config[name] is None) == (found.config.get(name) is None) for name in names)
    if same and statistics.keys() <= taken.keys():
        vae.register_to_config(**{name: found.config[name] for name in names})
        return
    world, generator = config.world, torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng((config.seed, 0))
    pixels = world.render(world.draw(world.prompts[0], 16 * CHUNK, rng), rng, config.checked_sizes)
    normalise(vae, raw_latents(vae, pixels, generator))


@torch.no_grad()
def strict_rate(vae: ModelMixin | Any, config: PretrainConfig, n: int) -> float:
    """Strict pass rate of `n` renders of held-out prompts after encoding and decoding."""
    world, sizes = config.world, config.checked_sizes
    rng, generator = np.random.default_rng((config.seed, 2)), torch.Generator().manual_seed(config.seed)
    pixels, prompts = world.truth(world.draw(world.prompts[1], n, rng), rng, sizes)
    latents = raw_latents(vae, pixels, generator)
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(CHUNK)])
    decoded = decoded.squeeze(2) if decoded.shape[2] == 1 else decoded
    reward = load_reward(config.evaluation(config.out, 1.0).rewards[0])
    scores = reward.score((decoded / 2 + 0.5).clamp(0, 1), prompts, 8.0)
    return float(scores.components["strict"].mean())
