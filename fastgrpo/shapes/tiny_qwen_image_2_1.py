"""A tiny random Qwen-Image 2.1 pipeline of the real classes; a closed vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgrpo.shapes.image_text import ImageTextProcessor
from fastgrpo.shapes.tiny_parts import END, PAD, START, build_template_tokenizer

# What the pipeline writes around a prompt; it cuts off the system's part, as long as its processor says that it is.
TEMPLATE = (
    "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|><|video_pad|>"
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def build_processor(words: tuple[str, ...]) -> Any:
    """A processor of one token a word or sign."""
    tokenizer = build_template_tokenizer(words, 2048, TEMPLATE)
    return ImageTextProcessor(Qwen2VLImageProcessorPil(patch_size=4, merge_size=2), tokenizer, CHAT)


def build_pipeline(words: tuple[str, ...], seed: int) -> QwenImage21Pipeline:
    """An untrained pipeline in float32 whose processor knows `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    processor, width = build_processor(words), 64
    text: dict[str, Any] = {
        "vocab_size": len(processor.tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": width // 16, "num_key_value_heads": width // 16, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "initializer_range": 0.1,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": width,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1] * 8, latents_std=[1.5] * 8,
    )  # fmt: skip
    transformer = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=24, num_attention_heads=4,
        context_in_dim=width, axes_dims_rope=(4, 10, 10),
    )  # fmt: skip
    # An output that is not nearly zero.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, max_shift=0.9
        ),
        "vae": vae,
        "text_encoder": Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)),
        "processor": processor,
        "transformer": transformer,
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return QwenImage21Pipeline(**parts)
