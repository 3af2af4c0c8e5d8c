"""Stable Diffusion 1.x, 2.x and XL (diffusion, text to image): a UNet on VAE latents, guided without a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.image import CLIP_TOKENS, check_image_size, vae_factor
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.protocol import Conditioning, ModelFamily

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
        for setting in ("clip_sample", "thresholding"):
            if parts["scheduler"].get(setting):
                raise ConfigError(
                    f"model.path: the scheduler of '{config.path}' asks for {setting}, and a clipped step is not "
                    f"affine in the model's output; set {setting} to false in its scheduler_config.json"
                )

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

    @cached_property
    def scheduler(self) -> Any:
        """DDIM with the betas, timesteps and prediction type of the pipeline's own scheduler, whatever its class."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        # A config without clip_sample (PNDM's) would turn it on.
        return DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False, thresholding=False)

    def noise_levels(self, steps: int, shift: float | str) -> NoiseLevels:
        if shift != "pipeline":
            raise ConfigError(
                f"rollout.shift: {shift}, but a diffusion model's levels are its betas'; set it to pipeline"
            )
        self.scheduler.set_timesteps(steps)
        times = self.scheduler.timesteps.tolist()
        alphas = self.scheduler.alphas_cumprod.double()
        stride = self.scheduler.config.num_train_timesteps // steps
        start = [float(alphas[t]) for t in times]
        # A step goes back by the stride, wherever rounding has put the next timestep.
        final = float(self.scheduler.final_alpha_cumprod)
        end = [float(alphas[t - stride]) if t >= stride else final for t in times]
        kind = self.scheduler.config.prediction_type
        return NoiseLevels(tuple(start), tuple(end), tuple(map(float, times)), ("unet",) * steps, kind)

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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return to_pixels(vae.decode((latents / vae.config.scaling_factor).to(self.vae_dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = self.pipeline.vae
        drawn = vae.encode((images * 2 - 1).to(self.vae_dtype)).latent_dist.sample(generator)
        return drawn.float() * vae.config.scaling_factor


def unet_factor(config: Mapping[str, Any]) -> int:
    """Latents that the UNet halves to one, along a side: its latents must divide by it."""
    return 2 ** (len(config["block_out_channels"]) - 1)
