"""FLUX.2-klein (rectified flow, text to image): patches of a batch-normed autoencoder, Qwen 3's text of three layers.

The base checkpoints are guided by two branches; the distilled ones, whatever model.guidance is, by none, as their
pipeline has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.models.families.image import check_image_size, check_text_length, vae_factor
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.protocol import Conditioning, ModelFamily


class Flux2(ModelFamily):
    name = "flux2"
    pipeline_classes = ("Flux2KleinPipeline",)
    guidance_style = "cfg"
    encoders = ("text_encoder", "tokenizer")
    context_kinds = ("ulysses", "ring")
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    # Its single-stream blocks have one layer for queries, keys, values and the first of the feed-forward's.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")

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

        return {"tokenizer": tiny_parts.build_chat_tokenizer(world.vocabulary(), length)}

    @property
    def guided(self) -> bool:
        return super().guided and not self.pipeline.config.is_distilled

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Patches of 2 × 2 of the autoencoder's latents: channels, rows, columns."""
        side = self.pipeline.vae_scale_factor * 2
        return self.pipeline.transformer.config.in_channels, self.config.height // side, self.config.width // side

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, rows, columns = self.latent_shape
        given = {} if scheduler.config.get("use_flow_sigmas") else super().timestep_arguments(scheduler, steps)
        return given | {"mu": compute_empirical_mu(image_seq_len=rows * columns, num_steps=steps)}

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        # Its pipeline leads away from an empty prompt, and takes no other as text.
        called = super().pipeline_arguments(steps)
        del called["negative_prompt"]
        return called

    @cached_property
    def position_ids(self) -> tuple[Tensor, Tensor]:
        """Text [1, L, 4] and image [1, rows · columns, 4] positions (time, row, column, place in the text)."""
        _, rows, columns = self.latent_shape
        text = torch.zeros(1, self.config.max_sequence_length, 4, dtype=torch.int64, device=self.device)
        text[..., 3] += torch.arange(self.config.max_sequence_length, device=self.device)
        image = torch.zeros(rows, columns, 4, dtype=torch.int64, device=self.device)
        image[..., 1] += torch.arange(rows, device=self.device)[:, None]
        image[..., 2] += torch.arange(columns, device=self.device)[None, :]
        return text, image.reshape(1, -1, 4)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        return {"text": (self.config.max_sequence_length, settings.joint_attention_dim)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        text, _ = self.encoder.encode_prompt(
            [p.text for p in prompts], device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return {"text": text}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, times = x.to(self.dtype).flatten(2).transpose(1, 2), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        text_ids, image_ids = self.position_ids
        # The transformer rounds the timestep to its input's dtype itself (diffusers' FLUX.2), as FLUX.1's does.
        output = (module or self.denoiser)(
            hidden_states=inputs,
            timestep=times,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        velocity = guide(output, self.config.guidance) if self.guided else output
        return velocity.transpose(1, 2).unflatten(2, x.shape[2:])

    @cached_property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the patches, [1, C, 1, 1], by the autoencoder's batch norm."""
        vae = self.pipeline.vae
        mean, variance = (t.float().view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self.latent_statistics
        patches = self.pipeline._unpatchify_latents(latents * std + mean)
        return to_pixels(self.pipeline.vae.decode(patches.to(self.vae_dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = self.latent_statistics
        drawn = self.pipeline.vae.encode((images * 2 - 1).to(self.vae_dtype)).latent_dist.sample(generator).float()
        return (self.pipeline._patchify_latents(drawn) - mean) / std
