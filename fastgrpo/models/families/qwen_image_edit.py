"""Qwen-Image-Edit and Edit-Plus (rectified flow, image and instruction to image): Qwen-Image with a source.

The vision-language encoder sees the source beside the instruction, and its latents stand behind the noisy ones. The
source is as large as the sample (model.height, model.width), where the pipelines take 1024 × 1024 pixels of its own
shape; Edit-Plus's encoder sees it at 384 × 384, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.models.families.qwen_image import QwenImage
from fastgrpo.models.families.shared import prompt_images
from fastgrpo.models.loading import resolve_path
from fastgrpo.shapes.image_text import ImageTextProcessor

# Pixels of a token of Qwen2.5-VL, along a side, where no encoder says otherwise.
TOKEN_SIDE = 28
# What Edit-Plus writes before a picture.
PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"


class QwenImageEdit(QwenImage):
    name = "qwen_image_edit"
    pipeline_classes = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    image_pipelines = pipeline_classes
    image_encoding = "source"
    encoders = ("text_encoder", "tokenizer", "processor")

    @classmethod
    def own_parts(cls, config: Model) -> dict[str, Any]:
        return {"processor": ImageTextProcessor.of_directory(resolve_path(config.path))}

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        return [2 * count for count in super().token_lengths(config, parts)]

    @property
    def is_plus(self) -> bool:
        return type(self.pipeline).__name__ == "QwenImageEditPlusPipeline"

    @property
    def seen_size(self) -> tuple[int, int]:
        """Height and width at which the encoder sees the source."""
        if not self.is_plus:
            return self.config.height, self.config.width
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, self.config.width / self.config.height)
        return height, width

    def text_tokens(self, encoder: Any) -> int:
        """Of the source, as the encoder sees it, and of the instruction. encoder: None for the published one."""
        vision = None if encoder is None else encoder.config.vision_config
        side = TOKEN_SIDE if vision is None else vision.patch_size * vision.spatial_merge_size
        height, width = self.seen_size
        return round(height / side) * round(width / side) + self.config.max_sequence_length

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        tokens = self.text_tokens(getattr(self.pipeline, "text_encoder", None))
        return {"text": (tokens, settings.joint_attention_dim), "mask": (tokens,), "source": self.latent_shape}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`text` [B, L, D], zero where a prompt has ended, and `mask` [B, L], bool, of source and instruction; `source`
        [B, tokens, C], its latents."""
        pipeline, sources = self.encoder, prompt_images(prompts, self.name)
        cut, before = pipeline.prompt_template_encode_start_idx, PICTURE if self.is_plus else ""
        tokens = pipeline.processor(
            text=[pipeline.prompt_template_encode.format(before + p.text) for p in prompts],
            images=[pipeline.image_processor.resize(source, *self.seen_size) for source in sources],
            max_length=cut + self.text_tokens(pipeline.text_encoder),
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        output = pipeline.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=tokens.pixel_values,
            image_grid_thw=tokens.image_grid_thw,
            output_hidden_states=True,
        )
        text, mask = output.hidden_states[-1][:, cut:], tokens.attention_mask[:, cut:].bool()
        return {"text": text * mask[..., None], "mask": mask, "source": self.encode_sources(sources)}

    def encode_sources(self, sources: Sequence[Any]) -> Tensor:
        """Latents of the sources, [B, tokens, C], one by one: at real sizes a batch's activations are gigabytes."""
        pipeline, size, (mean, std) = self.pipeline, (self.config.height, self.config.width), self.latent_statistics
        packed = []
        for source in sources:
            pixels = pipeline.image_processor.preprocess(pipeline.image_processor.resize(source, *size), *size)
            latents = pipeline.vae.encode(pixels.to(self.device, self.vae_dtype)[:, :, None]).latent_dist.mode()
            scaled = ((latents.float() - mean) / std)[:, :, 0]
            packed.append(pipeline._pack_latents(scaled, *scaled.shape))
        return torch.cat(packed)
