"""A Qwen-Image pipeline of about a million parameters: diffusers' and transformers' own classes, a closed vocabulary.

`QwenImagePipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fastgrpo.config.sections import Section
from fastgrpo.errors import ConfigError
from fastgrpo.shapes.tiny_parts import END, PAD, START, build_template_tokenizer

# What the pipeline writes around a prompt; it cuts off the first 34 tokens, those before the prompt.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_START = 34


class TinyQwenImageSizes(Section):
    """Sizes of the tiny Qwen-Image."""

    image_size: int = 32
    # Of a prompt's words and the template's end.
    text_length: int = 14
    latent_channels: int = 3
    vae_channels: int = 16
    # Channels of each level, relative to vae_channels; each level after the first halves the sides.
    vae_levels: list[int] = Field(default_factory=lambda: [1, 2, 3])
    attention_heads: int = 4
    attention_head_dim: int = 24
    rope_axes: list[int] = Field(default_factory=lambda: [4, 10, 10])
    layers: int = 4
    text_width: int = 64
    text_layers: int = 2

    @model_validator(mode="after")
    def _check(self) -> "TinyQwenImageSizes":
        if sum(self.rope_axes) != self.attention_head_dim:
            raise ConfigError(
                f"sizes.rope_axes: {self.rope_axes} sums to {sum(self.rope_axes)}; "
                f"it must sum to sizes.attention_head_dim, {self.attention_head_dim}"
            )
        if self.text_width % 16:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 16, the width of a head")
        return self


def build_qwen(width: int, layers: int, vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of heads of 16, with next to no vision tower, which the pipeline never uses."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "initializer_range": 0.1,
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "patch_size": 4,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def build_pipeline(words: tuple[str, ...], sizes: TinyQwenImageSizes, seed: int) -> QwenImagePipeline:
    """An untrained QwenImagePipeline in float32 whose tokenizer knows `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    tokenizer = build_template_tokenizer(words, TEMPLATE_START + sizes.text_length, TEMPLATE)
    vae = AutoencoderKLQwenImage(
        base_dim=sizes.vae_channels,
        z_dim=sizes.latent_channels,
        dim_mult=sizes.vae_levels,
        num_res_blocks=1,
        # An image has one frame: nothing to halve in time.
        temperal_downsample=[False] * (len(sizes.vae_levels) - 1),
        latents_mean=[0.0] * sizes.latent_channels,
        latents_std=[1.0] * sizes.latent_channels,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.attention_head_dim,
        num_attention_heads=sizes.attention_heads,
        joint_attention_dim=sizes.text_width,
        axes_dims_rope=tuple(sizes.rope_axes),  # pyright: ignore[reportArgumentType]
    )
    parts: dict[str, Any] = {
        # As published, but for its resolutions: those of the tiny images.
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=4,
            max_image_seq_len=64,
            shift_terminal=0.02,
        ),
        "vae": vae,
        "text_encoder": build_qwen(sizes.text_width, sizes.text_layers, len(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline = QwenImagePipeline(**parts)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == TEMPLATE_START
    return pipeline
