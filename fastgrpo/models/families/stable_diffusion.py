"""Stable Diffusion 1.x, 2.x and XL (diffusion, text to image): a UNet on VAE latents, guided without a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.image import CLIP_TOKENS, check_image_size, vae_factor
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.protocol import Conditioning, ModelFamily
from fastgrpo.models.schedulers import check_diffusion_scheduler, ddim_steps

# Of XL's larger CLIP.
POOLED_WIDTH = 1280


class StableDiffusion(ModelFamily):
    name = "stable_diffusion"
    pipeline_classes = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    paradigm = "diffusion"
    guidance_style = "cfg"
    trained = ("unet",)
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, vae_factor(parts["vae"]) * unet_factor(parts["unet"]), cls.name)
        check_diffusion_scheduler(config, parts["scheduler"])

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_parts, world

        return {"tokenizer": tiny_parts.build_tokenizer(world.vocabulary(), CLIP_TOKENS, start=True)}

    @property
    def xl(self) -> bool:
        return type(self.pipeline).__name__ == "StableDiffusionXLPipeline"

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        unet = cast(Any, module)
        return [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = vae_factor(self.pipeline.vae.config)
        return self.pipeline.unet.config.in_channels, self.config.height // factor, self.config.width // factor

    def sampling_scheduler(self, shift: float | str) -> Any:
        """DDIM with the betas, timesteps and prediction type of the pipeline's own scheduler, whatever its class."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        if shift != "pipeline":
            raise ConfigError(
                f"rollout.shift: {shift}, but a diffusion model's levels are its betas'; set it to pipeline"
            )
        # A config without clip_sample (PNDM's) would turn it on.
        return DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False, thresholding=False)

    def noise_levels(self, steps: int, shift: float | str) -> NoiseLevels:
        levels = ddim_steps(self.sampling_scheduler(shift), steps, self.config.path)
        return replace(levels, modules=self.acting_modules(levels))

    def forward_table(self) -> np.ndarray:
        return self.sampling_scheduler("pipeline").alphas_cumprod.double().numpy()

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        called = super().pipeline_arguments(steps)
        del called["max_sequence_length"]
        return called

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return f"lora_unet_{layer.replace('.', '_')}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        text = {"text": (CLIP_TOKENS, settings.cross_attention_dim)}
        return text | ({"pooled": (POOLED_WIDTH,)} if settings.addition_embed_type == "text_time" else {})

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        texts = [p.text for p in prompts]
        if not self.xl:
            text, _ = self.encoder.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)
            return {"text": text}
        text, _, pooled, _ = self.encoder.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
        if self.encoder.config.force_zeros_for_empty_prompt:
            # What the pipeline puts in the place of a negative prompt that is not given.
            written = torch.tensor([float(bool(t)) for t in texts], dtype=text.dtype, device=text.device)
            text, pooled = text * written[:, None, None], pooled * written[:, None]
        return {"text": text, "pooled": pooled}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, times = x.to(self.dtype, memory_format=torch.channels_last), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        added = None
        if self.xl:
            # Original size, crop and target size, as the pipeline gives them for an image that is not cropped.
            size = (self.config.height, self.config.width)
            ids = torch.tensor([*size, 0, 0, *size], dtype=self.dtype, device=x.device).expand(len(inputs), -1)
            pooled = conditioning.branches("pooled", self.guided).to(self.dtype)
            added = {"text_embeds": pooled, "time_ids": ids}
        # The UNet embeds a float32 timestep unrounded, and rounds the embedding.
        output = (module or self.denoiser)(
            inputs,
            times,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return guide(output, self.config.guidance) if self.guided else output

    @cached_property
    def latent_statistics(self) -> tuple[float | Tensor, float | Tensor]:
        """Mean and scale of the VAE's latents: by channel [1, C, 1, 1] where XL's VAE has statistics, else 0 and its
        scaling factor. The other pipelines of this family do not look at a VAE's statistics."""
        vae = self.pipeline.vae.config
        mean, std = vae.get("latents_mean"), vae.get("latents_std")
        if not self.xl or mean is None or std is None:
            return 0.0, vae.scaling_factor
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (mean, std))
        return mean, vae.scaling_factor / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, scale = self.latent_statistics
        return to_pixels(vae.decode((latents / scale + mean).to(self.vae_dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = self.pipeline.vae
        drawn = vae.encode((images * 2 - 1).to(self.vae_dtype)).latent_dist.sample(generator)
        mean, scale = self.latent_statistics
        return (drawn.float() - mean) * scale


def unet_factor(config: Mapping[str, Any]) -> int:
    """Latents that the UNet halves to one, along a side: its latents must divide by it."""
    return 2 ** (len(config["block_out_channels"]) - 1)
