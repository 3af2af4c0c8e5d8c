"""HunyuanVideo and SkyReels-I2V pipelines of about a million parameters: the real classes, a closed vocabulary.

`HunyuanVideoPipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video import HunyuanSkyreelsImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE, HunyuanVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from fastgrpo.config.sections import Section
from fastgrpo.shapes.tiny_parts import END, PAD, START, build_clip, build_template_tokenizer

# The pipeline encodes the pooled text at this length, whatever it is asked for.
CLIP_LENGTH = 77


class TinyHunyuanVideoSizes(Section):
    """Sizes of the tiny HunyuanVideo; the defaults are those of the shipped weights."""

    task: Literal["text", "image"] = "text"
    image_size: int = 32
    frames: int = 9
    text_length: int = 14
    latent_channels: int = 8
    vae_channels: list[int] = Field(default_factory=lambda: [8, 16, 24, 32])
    spatial_factor: int = 8
    patch_size: int = 1
    attention_heads: int = 4
    attention_head_dim: int = 24
    rope_axes: list[int] = Field(default_factory=lambda: [4, 10, 10])
    double_layers: int = 1
    single_layers: int = 4
    refiner_layers: int = 1
    text_width: int = 48
    shift: float = 3.0


def build_tokenizer(words: tuple[str, ...], length: int, template: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word or sign; that of the `template` adds nothing to a text, else <s> … </s>."""
    return build_template_tokenizer(words, length, DEFAULT_PROMPT_TEMPLATE["template"] if template else None)


def build_llama(width: int, vocabulary: int, length: int) -> LlamaModel:
    """An untrained Llama of three layers: the pipeline reads the state after the first, skipping two."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=length,
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    return LlamaModel(config)


def build_autoencoder(sizes: TinyHunyuanVideoSizes) -> AutoencoderKLHunyuanVideo:
    """An untrained video VAE: 4k + 1 frames to k + 1 latents; set its scale after training."""
    levels = len(sizes.vae_channels)
    settings: dict[str, Any] = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * levels,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * levels,
        "block_out_channels": tuple(sizes.vae_channels),
    }
    return AutoencoderKLHunyuanVideo(
        **settings,
        latent_channels=sizes.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        spatial_compression_ratio=sizes.spatial_factor,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )


def build_pipeline(words: tuple[str, ...], sizes: TinyHunyuanVideoSizes, seed: int) -> Any:
    """An untrained pipeline in float32 whose tokenizers know `words`; resets torch's global seed.

    task "text": a HunyuanVideoPipeline; "image": a HunyuanSkyreelsImageToVideoPipeline.
    """
    torch.manual_seed(seed)
    length = DEFAULT_PROMPT_TEMPLATE["crop_start"] + sizes.text_length
    tokenizer = build_tokenizer(words, length, template=True)
    pooled = build_tokenizer(words, CLIP_LENGTH, template=False)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=sizes.latent_channels * (2 if sizes.task == "image" else 1),
        out_channels=sizes.latent_channels,
        num_attention_heads=sizes.attention_heads,
        attention_head_dim=sizes.attention_head_dim,
        num_layers=sizes.double_layers,
        num_single_layers=sizes.single_layers,
        num_refiner_layers=sizes.refiner_layers,
        patch_size=sizes.patch_size,
        text_embed_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        rope_axes_dim=tuple(sizes.rope_axes),
    )
    parts: dict[str, Any] = {
        "text_encoder": build_llama(sizes.text_width, len(tokenizer), length),
        "tokenizer": tokenizer,
        "text_encoder_2": build_clip(sizes.text_width, 2, CLIP_LENGTH, len(pooled)),
        "tokenizer_2": pooled,
        "transformer": transformer,
        "vae": build_autoencoder(sizes),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=sizes.shift),
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return (HunyuanSkyreelsImageToVideoPipeline if sizes.task == "image" else HunyuanVideoPipeline)(**parts)
