"""A CLIP of a million parameters that has seen the shapes world: transformers' CLIPModel.

`fastgrpo pretrain configs/pretrain-shapes-clip.yaml` trains it; `CLIPModel.from_pretrained` loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.config.sections import Section
from fastgrpo.shapes import world
from fastgrpo.shapes.tiny_parts import END, PAD, SPECIAL_TOKENS, START, build_tokenizer


class TinyClipSizes(Section):
    """Sizes of the tiny CLIP; the defaults are those of the shipped weights."""

    image_size: int = 32
    patch: int = 8
    text_length: int = 10
    width: int = Field(default=96, multiple_of=16)
    vision_layers: int = 4
    text_layers: int = 2
    embedding: int = 64


def build_clip(sizes: TinyClipSizes, seed: int) -> CLIPModel:
    """An untrained CLIPModel in float32; resets torch's global seed."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.width // 16,
    }
    text = {
        **tower,
        "vocab_size": len(SPECIAL_TOKENS) + len(world.vocabulary()),
        "max_position_embeddings": sizes.text_length,
        "num_hidden_layers": sizes.text_layers,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = {
        **tower,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch,
        "num_hidden_layers": sizes.vision_layers,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embedding)
    return CLIPModel(config)


def tokens(texts: Sequence[str], sizes: TinyClipSizes) -> dict[str, Tensor]:
    """Token ids and mask of prompts, padded to the model's length."""
    return dict(_tokenizer(sizes.text_length)(list(texts), padding="max_length", return_tensors="pt"))


@functools.cache
def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    return build_tokenizer(world.vocabulary(), length, start=True)


def save(model: CLIPModel, sizes: TinyClipSizes, path: Path) -> None:
    """Writes model (float16), tokenizer and image processor, as a published CLIP has them."""
    model.half().save_pretrained(path)
    _tokenizer(sizes.text_length).save_pretrained(path)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessorPil(
        size={"shortest_edge": sizes.image_size}, crop_size=side, image_mean=half, image_std=half
    ).save_pretrained(path)
