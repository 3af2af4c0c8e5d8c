"""FLUX.1 (rectified flow, text to image): packed latents, embedded guidance, CLIP and T5 text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from fastgrpo.errors import ConfigError
from fastgrpo.models.base import Conditioning, ModelFamily
from fastgrpo.prompts import Prompt


class Flux(ModelFamily):
    name = "flux"
    pipeline_class = "FluxPipeline"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def patch_pixels(self) -> int:
        """Side of the square of pixels that one token stands for: the VAE's factor times FLUX's 2×2 packing."""
        return self.pipeline.vae_scale_factor * 2

    def check_size(self) -> None:
        for key in ("height", "width"):
            size = getattr(self.config, key)
            if size % self.patch_pixels:
                below = max(size // self.patch_pixels, 1) * self.patch_pixels
                raise ConfigError(
                    f"model.{key}: {size} is not a multiple of {self.patch_pixels}; the nearest is {below}"
                )
        if self.config.frames != 1:
            raise ConfigError(f"model.frames: {self.config.frames}, but flux makes images; set it to 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.config.height // self.patch_pixels, self.config.width // self.patch_pixels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        rows, columns = self.grid
        return rows * columns, self.pipeline.transformer.config.in_channels

    def pipeline_shift(self) -> float:
        """exp(μ) with μ linear in the number of image tokens where the scheduler shifts by resolution."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (self.latent_shape[0] - config.base_image_seq_len)
        # time_shift_type "linear" takes μ itself as the factor.
        return float(mu if config.time_shift_type == "linear" else torch.tensor(mu, dtype=torch.float64).exp())

    @cached_property
    def position_ids(self) -> tuple[Tensor, Tensor]:
        """Text [L, 3] (zeros) and image [rows · columns, 3] positions of the rotary embedding."""
        rows, columns = self.grid
        image = torch.zeros(rows, columns, 3, device=self.device)
        image[..., 1] += torch.arange(rows, device=self.device)[:, None]
        image[..., 2] += torch.arange(columns, device=self.device)[None, :]
        return torch.zeros(self.config.max_sequence_length, 3, device=self.device), image.reshape(-1, 3)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompt=[p.text for p in prompts],
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"text": embeddings, "pooled": pooled}

    def predict(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        text_ids, image_ids = self.position_ids
        # The transformer rounds timestep and guidance to its input's dtype itself (diffusers' FLUX): documented.
        guidance = (
            torch.full_like(sigma, self.config.guidance) if self.pipeline.transformer.config.guidance_embeds else None
        )
        return (transformer or self.transformer)(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=conditioning["text"].to(self.dtype),
            pooled_projections=conditioning["pooled"].to(self.dtype),
            timestep=sigma,
            guidance=guidance,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, self.config.height, self.config.width, self.pipeline.vae_scale_factor
        )
        scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
