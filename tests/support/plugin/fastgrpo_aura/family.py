"""AuraFlow (rectified flow, text to image): one text encoder, guided by two branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data import Prompt
from fastgrpo.models import Conditioning, ModelFamily
from fastgrpo.models.families.image import check_image_size, vae_factor
from fastgrpo.models.families.shared import guide, to_pixels


class AuraFlow(ModelFamily):
    name = "aura_flow"
    pipeline_classes = ("AuraFlowPipeline",)
    guidance_style = "cfg"
    encoders = ("text_encoder", "tokenizer")
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, vae_factor(parts["vae"]) * parts["transformer"]["patch_size"], cls.name)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor, settings = self.pipeline.vae_scale_factor, self.pipeline.transformer.config
        return settings.in_channels, self.config.height // factor, self.config.width // factor

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        return {}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (self.config.max_sequence_length, self.pipeline.transformer.config.joint_attention_dim)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        text, _, _, _ = self.encoder.encode_prompt(
            [p.text for p in prompts],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"text": text}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, times = x.to(self.dtype), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        output = (module or self.denoiser)(
            inputs,
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            timestep=times,
            return_dict=False,
        )[0]
        return guide(output, self.config.guidance) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return to_pixels(vae.decode((latents / vae.config.scaling_factor).to(self.vae_dtype), return_dict=False)[0])
