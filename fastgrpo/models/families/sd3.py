"""Stable Diffusion 3 and 3.5 (rectified flow, text to image): two CLIPs' and T5's text, guided without a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.image import (
    CLIP_TOKENS,
    check_image_size,
    check_text_length,
    decode_latents,
    dynamic_mu,
    encode_pixels,
    vae_factor,
)
from fastgrpo.models.families.shared import guide
from fastgrpo.models.protocol import Conditioning, ModelFamily


class StableDiffusion3(ModelFamily):
    name = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    guidance_style = "cfg"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    optional_encoders = ("text_encoder_3", "tokenizer_3")
    block_lists = ("transformer_blocks",)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        patch = vae_factor(parts["vae"]) * parts["transformer"]["patch_size"]
        check_image_size(config, patch, cls.name)
        check_text_length(config, 512, cls.name)
        largest = patch * parts["transformer"]["pos_embed_max_size"]
        for key in ("height", "width"):
            if getattr(config, key) > largest:
                raise ConfigError(
                    f"model.{key}: {getattr(config, key)}, but the position embedding of '{config.path}' ends at "
                    f"{largest} pixels"
                )

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_parts, world

        words = world.vocabulary()
        clip = tiny_parts.build_tokenizer(words, CLIP_TOKENS, start=True)
        t5 = tiny_parts.build_tokenizer(words, length, start=False)
        return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, self.config.height // factor, self.config.width // factor

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape
        patch = self.pipeline.transformer.config.patch_size
        # Its pipeline's own default, where the config is silent.
        settings = {"max_shift": 1.16, **scheduler.config}
        return {"mu": dynamic_mu(settings, (height // patch) * (width // patch))}

    @cached_property
    def encoder(self) -> Any:
        encoder = super().encoder
        if encoder.transformer is None:
            # Without a T5 the pipeline puts zeros in its place, as wide as the transformer says.
            encoder.transformer = self.pipeline.transformer
        return encoder

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return f"transformer.{layer}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        text = CLIP_TOKENS + self.config.max_sequence_length, settings.joint_attention_dim
        return {"text": text, "pooled": (settings.pooled_projection_dim,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.encoder.encode_prompt(
            prompt=[p.text for p in prompts],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"text": text, "pooled": pooled}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, times = x.to(self.dtype), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        # The transformer embeds a float32 timestep unrounded, and rounds the embedding.
        output = (module or self.denoiser)(
            hidden_states=inputs,
            timestep=times * 1000,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            pooled_projections=conditioning.branches("pooled", self.guided).to(self.dtype),
            return_dict=False,
        )[0]
        return guide(output, self.config.guidance) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.pipeline.vae, latents, self.vae_dtype)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return encode_pixels(self.pipeline.vae, images, self.vae_dtype, generator)
