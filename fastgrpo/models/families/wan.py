"""Wan 2.1 and 2.2 (rectified flow): text to video, image to video, and the 5 B that does both.

Wan 2.2's 14 B has two transformers, one for each side of a noise level. The 5 B is told a noise level per token: its
first frame, where it is given, stands at level 0 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.shared import guide, prompt_images, to_pixels
from fastgrpo.models.families.video import check_video_size, first_frames, latent_frames, set_tiling, video_tokens
from fastgrpo.models.protocol import Conditioning, ModelFamily

# What the cross-attention of Wan 2.1's image-to-video models takes for text, whatever they are given.
IMAGE_TEXT_TOKENS = 512
# Of the CLIP that encodes their first frame: 16 × 16 patches and a class token.
IMAGE_TOKENS = 257
# Layers of diffusers' transformer under the names of Wan's own, which ComfyUI has.
COMFYUI_NAMES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


class Wan(ModelFamily):
    name = "wan"
    pipeline_classes = ("WanPipeline", "WanImageToVideoPipeline")
    image_pipelines = ("WanImageToVideoPipeline",)
    guidance_style = "cfg"
    trained = ("transformer", "transformer_2")
    encoders = ("text_encoder", "tokenizer")
    context_kinds = ("ulysses", "ring")
    block_lists = ("blocks",)

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        set_tiling(pipeline.vae, self.config)
        for name in self.modules:
            # What a frozen copy of it knows too.
            getattr(pipeline, name).is_second = name == "transformer_2"

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        transformer = parts.get("transformer") or parts["transformer_2"]
        vae, patch = parts["vae"], transformer["patch_size"]
        check_video_size(config, vae["scale_factor_spatial"] * patch[1], vae["scale_factor_temporal"])
        if config.guidance_2 is not None and "transformer_2" not in parts:
            raise ConfigError(
                f"model.guidance_2: {config.guidance_2:g}, but '{config.path}' has one transformer; leave it out"
            )
        if transformer["image_dim"] is not None and config.max_sequence_length != IMAGE_TEXT_TOKENS:
            raise ConfigError(
                f"model.max_sequence_length: {config.max_sequence_length}, but Wan 2.1's image-to-video models take "
                f"{IMAGE_TEXT_TOKENS} text tokens"
            )

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        vae, transformer = parts["vae"], parts.get("transformer") or parts["transformer_2"]
        space, time = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        return [video_tokens(config, space, time, transformer["patch_size"])]

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import moving_world, tiny_hunyuan_video

        return {"tokenizer": tiny_hunyuan_video.build_tokenizer(moving_world.vocabulary(), length, template=False)}

    @property
    def guided(self) -> bool:
        return max(self.config.guidance, self.config.guidance_2 or 0.0) > self.unguided_scale

    @property
    def per_token(self) -> bool:
        """Whether the transformer is told a noise level per token (Wan 2.2's 5 B)."""
        return bool(self.pipeline.config.expand_timesteps)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        vae = self.pipeline.vae.config
        frames, factor = latent_frames(self.config, vae.scale_factor_temporal), vae.scale_factor_spatial
        return vae.z_dim, frames, self.config.height // factor, self.config.width // factor

    def noise_levels(self, steps: int, shift: float | str) -> NoiseLevels:
        levels = super().noise_levels(steps, shift)
        # A first frame that is given is led to itself by its level (`predict`), which a rounded timestep is not.
        return replace(levels, times=levels.start) if self.per_token and self.takes_image else levels

    @cached_property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, [1, C, 1, 1, 1]."""
        vae = self.pipeline.vae.config
        mean, std = (torch.tensor(v, device=self.device) for v in (vae.latents_mean, vae.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        return {}

    def acting_modules(self, levels: NoiseLevels) -> tuple[str, ...]:
        boundary = self.pipeline.config.boundary_ratio
        # Of timesteps in float32, as the pipeline compares them.
        noisy = [boundary is None or np.float32(1000) * np.float32(t) >= 1000 * boundary for t in levels.times]
        return tuple("transformer" if first else "transformer_2" for first in noisy)

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        second = {} if self.config.guidance_2 is None else {"guidance_scale_2": self.config.guidance_2}
        return super().pipeline_arguments(steps) | second

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        name = layer
        for theirs, ours in COMFYUI_NAMES.items():
            name = name.replace(f".{theirs}", f".{ours}")
        return f"diffusion_model.{name}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        shapes: dict[str, tuple[int, ...]] = {"text": (self.config.max_sequence_length, settings.text_dim)}
        if not self.takes_image:
            return shapes
        channels, frames, height, width = self.latent_shape
        if self.per_token:
            return shapes | {"condition": (channels, 1, height, width)}
        given = self.pipeline.vae.config.scale_factor_temporal
        shapes["condition"] = (channels + given, frames, height, width)
        return shapes | ({"image": (IMAGE_TOKENS, settings.image_dim)} if settings.image_dim is not None else {})

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        text, _ = self.encoder.encode_prompt(
            [p.text for p in prompts],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"text": text, **(self.encode_first_frames(prompts) if self.takes_image else {})}

    def encode_first_frames(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`condition` [B, C, F, h, w] (F = 1 per token), and where the transformer takes them, `image` features."""
        pipeline = self.pipeline
        video = first_frames(pipeline, prompts, self.config, self.device).to(pipeline.vae.dtype)[:, :, None]
        if not self.per_token:
            rest = video.new_zeros(1).expand(*video.shape[:2], self.config.frames - 1, *video.shape[3:])
            video = torch.cat([video, rest], dim=2)
        mean, std = self.latent_statistics
        condition = (pipeline.vae.encode(video).latent_dist.mode().float() - mean) / std
        if self.per_token:
            return {"condition": condition}
        # Channels that say which of a latent frame's video frames are given.
        given = torch.zeros_like(condition[:, : pipeline.vae.config.scale_factor_temporal])
        given[:, :, 0] = 1
        tensors = {"condition": torch.cat([given, condition], dim=1)}
        if pipeline.transformer.config.image_dim is not None:
            tensors["image"] = pipeline.encode_image(prompt_images(prompts, self.name), self.device)
        return tensors

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        model: Any = module or self.denoiser
        inputs, times = self.inputs(x, conditioning), self.times(x, time, model)
        image = conditioning["image"].to(self.dtype) if "image" in conditioning else None
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            image = None if image is None else torch.cat([image, image])
        output = model(
            hidden_states=inputs.to(self.dtype),
            timestep=times,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        second = self.config.guidance_2 if model.is_second else None
        scale = self.config.guidance if second is None else second
        velocity = guide(output, scale) if self.guided else output
        if not (self.per_token and self.takes_image):
            return velocity
        # What leads a first frame that is given from any latent to itself: the same for every policy.
        towards = (x[:, :, :1] - conditioning["condition"]) / time.view(-1, 1, 1, 1, 1)
        return torch.cat([towards.to(velocity.dtype), velocity[:, :, 1:]], dim=2)

    def inputs(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        if not self.takes_image:
            return x
        if self.per_token:
            return torch.cat([conditioning["condition"], x[:, :, 1:]], dim=2)
        return torch.cat([x, conditioning["condition"]], dim=1)

    def times(self, x: Tensor, time: Tensor, model: Any) -> Tensor:
        """Timesteps [B], or [B, tokens]; 0 for the tokens of a first frame that is given."""
        if not self.per_token:
            return time * 1000
        frame, height, width = (n // p for n, p in zip(x.shape[2:], model.config.patch_size, strict=True))
        level = (time * 1000)[:, None].expand(-1, frame * height * width)
        if not self.takes_image:
            return level
        later = torch.arange(frame * height * width, device=x.device) >= height * width
        return level * later

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self.latent_statistics
        vae = self.pipeline.vae
        return to_pixels(vae.decode((latents * std + mean).to(self.vae_dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self.latent_statistics
        drawn = vae.encode((images * 2 - 1).to(self.vae_dtype)).latent_dist.sample(generator)
        return (drawn.float() - mean) / std
