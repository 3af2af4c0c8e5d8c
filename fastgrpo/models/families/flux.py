"""FLUX.1 (rectified flow, text to image): packed latents, embedded guidance, CLIP and T5 text.

With model.true_cfg above 1 it is guided by two branches too, as its pipeline's `true_cfg_scale` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
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


class Flux(ModelFamily):
    name = "flux"
    pipeline_classes = ("FluxPipeline",)
    guidance_style = "embedded"
    takes_true_cfg = True
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    context_kinds = ("ulysses", "ring")
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    @property
    def patch_pixels(self) -> int:
        """Side of the square of pixels that one token stands for: the VAE's factor times FLUX's 2×2 packing."""
        return self.pipeline.vae_scale_factor * 2

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, 2 * vae_factor(parts["vae"]), cls.name)
        check_text_length(config, 512, cls.name)

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        side = 2 * vae_factor(parts["vae"])
        return [(config.height // side) * (config.width // side), config.max_sequence_length]

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_parts, world

        words = world.vocabulary()
        clip = tiny_parts.build_tokenizer(words, CLIP_TOKENS, start=True)
        return {"tokenizer": clip, "tokenizer_2": tiny_parts.build_tokenizer(words, length, start=False)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.config.height // self.patch_pixels, self.config.width // self.patch_pixels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        rows, columns = self.grid
        return rows * columns, self.pipeline.transformer.config.in_channels

    def pipeline_shift(self) -> float | None:
        """exp(μ) with μ linear in the number of image tokens where the scheduler shifts by resolution."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return super().pipeline_shift()
        mu = dynamic_mu(config, self.latent_shape[0])
        # time_shift_type "linear" takes μ itself as the factor.
        return float(mu if config.time_shift_type == "linear" else torch.tensor(mu, dtype=torch.float64).exp())

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        given = {} if scheduler.config.get("use_flow_sigmas") else super().timestep_arguments(scheduler, steps)
        return given | {"mu": dynamic_mu(scheduler.config, self.latent_shape[0])}

    @cached_property
    def position_ids(self) -> tuple[Tensor, Tensor]:
        """Text [L, 3] (zeros) and image [rows · columns, 3] positions of the rotary embedding."""
        rows, columns = self.grid
        image = torch.zeros(rows, columns, 3, device=self.device)
        image[..., 1] += torch.arange(rows, device=self.device)[:, None]
        image[..., 2] += torch.arange(columns, device=self.device)[None, :]
        return torch.zeros(self.config.max_sequence_length, 3, device=self.device), image.reshape(-1, 3)

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return f"transformer.{layer}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        text = self.config.max_sequence_length, settings.joint_attention_dim
        return {"text": text, "pooled": (settings.pooled_projection_dim,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        embeddings, pooled, _ = self.encoder.encode_prompt(
            prompt=[p.text for p in prompts],
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"text": embeddings, "pooled": pooled}

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        called = super().pipeline_arguments(steps)
        if self.guided:
            called |= {"negative_prompt": self.config.negative_prompt, "true_cfg_scale": self.config.true_cfg}
        return called

    def image_tokens(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The image tokens of a forward pass [B, N, C], those of `x` first, and their positions [N, 3]."""
        return x.to(self.dtype), self.position_ids[1]

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, image_ids = self.image_tokens(x, conditioning)
        if self.guided:
            inputs, time = torch.cat([inputs, inputs]), torch.cat([time, time])
        # The transformer rounds timestep and guidance to its input's dtype itself (diffusers' FLUX): documented.
        guidance = (
            torch.full_like(time, self.config.guidance) if self.pipeline.transformer.config.guidance_embeds else None
        )
        output = (module or self.denoiser)(
            hidden_states=inputs,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            pooled_projections=conditioning.branches("pooled", self.guided).to(self.dtype),
            timestep=time,
            guidance=guidance,
            txt_ids=self.position_ids[0],
            img_ids=image_ids,
            return_dict=False,
        )[0][:, : x.shape[1]]
        return guide(output, self.config.true_cfg) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        unpacked = self.pipeline._unpack_latents(
            latents, self.config.height, self.config.width, self.pipeline.vae_scale_factor
        )
        return decode_latents(self.pipeline.vae, unpacked, self.vae_dtype)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        scaled = encode_pixels(self.pipeline.vae, images, self.vae_dtype, generator)
        return self.pipeline._pack_latents(scaled, *scaled.shape)
