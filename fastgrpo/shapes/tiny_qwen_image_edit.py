"""Tiny random Qwen-Image-Edit and Edit-Plus pipelines of the real classes; a closed vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.shapes import tiny_qwen_image
from fastgrpo.shapes.image_text import ImageTextProcessor
from fastgrpo.shapes.tiny_parts import build_template_tokenizer

# Whatever the pipelines' templates have around a prompt. The pipeline cuts off the first 64 tokens.
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n<|video_pad|>"
)
# Pixels of a patch, along a side; four are a token.
PATCH = 4


def build_pipeline(words: tuple[str, ...], seed: int, plus: bool = False) -> Any:
    """An untrained pipeline in float32 whose tokenizer knows `words`; resets torch's global seed.

    plus: Edit-Plus, whose encoder sees a smaller picture.
    """
    # Its pipelines take a picture of as many channels as the latents for latents: here they have another number.
    sizes = tiny_qwen_image.TinyQwenImageSizes(layers=2, latent_channels=4)
    plain = tiny_qwen_image.build_pipeline(words, sizes, seed)
    tokenizer = build_template_tokenizer(words, 2048, TEMPLATE)
    settings = plain.text_encoder.config.to_dict()
    text = {**settings["text_config"], "vocab_size": len(tokenizer)}
    vision = {**settings["vision_config"], "spatial_patch_size": PATCH}
    ids: Any = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    image, video = ids
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video)
    size = {"shortest_edge": PATCH**2, "longest_edge": 2**20}
    pictures = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size)
    parts = {
        **plain.components,
        "tokenizer": tokenizer,
        "processor": ImageTextProcessor(pictures, tokenizer),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
    }
    with torch.no_grad():
        return (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(**parts)
