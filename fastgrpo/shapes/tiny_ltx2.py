"""A tiny random LTX-2 pipeline of the real classes; a closed vocabulary.

`LTX2Pipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fastgrpo.shapes.tiny_parts import END, PAD, START, build_template_tokenizer

WIDTH, TEXT_LAYERS, REGISTERS = 32, 2, 4
# Pixels and frames of a latent; bins of a spectrogram, of which four are a latent of the sound.
SPACE, TIME, MEL_BINS = 4, 2, 8


def build_tokenizer(words: tuple[str, ...], length: int) -> Any:
    """A tokenizer of one token a word, with a start and an end, padded to `length`."""
    return build_template_tokenizer(words, length, None)


def build_pipeline(words: tuple[str, ...], seed: int, per_modality: bool = False) -> LTX2Pipeline:
    """An untrained pipeline in float32 whose tokenizer knows `words`; resets torch's global seed.

    per_modality: as LTX-2.3 has it, text projected for video and sound apart, and modulated by the noise level.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(words, 1024)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": 16, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
        "initializer_range": 0.1,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    sound_width = WIDTH // 2
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=WIDTH // 2,
        video_connector_num_layers=1, video_connector_num_learnable_registers=REGISTERS,
        audio_connector_num_attention_heads=2, audio_connector_num_layers=1,
        audio_connector_attention_head_dim=(sound_width if per_modality else WIDTH) // 2,
        audio_connector_num_learnable_registers=REGISTERS, connector_rope_base_seq_len=32,
        rope_double_precision=False, rope_type="split", per_modality_projections=per_modality,
        video_hidden_dim=WIDTH, audio_hidden_dim=sound_width,
    )  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH, vae_scale_factors=(TIME, SPACE, SPACE), base_height=64, base_width=64,
        audio_in_channels=MEL_BINS, audio_out_channels=MEL_BINS, audio_num_attention_heads=2,
        audio_attention_head_dim=sound_width // 2, audio_cross_attention_dim=sound_width, num_layers=2,
        caption_channels=WIDTH, rope_double_precision=False, rope_type="split",
        use_prompt_embeddings=not per_modality, cross_attn_mod=per_modality, audio_cross_attn_mod=per_modality,
        gated_attn=per_modality, audio_gated_attn=per_modality,
    )  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(16,), down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(16,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=2,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=MEL_BINS, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=32, latent_channels=4, mel_bins=MEL_BINS
    )
    # What the statistics are, of autoencoders that are trained.
    for part in (vae, audio_vae):
        torch.nn.init.normal_(part.latents_mean, std=0.5)
        torch.nn.init.uniform_(part.latents_std, 0.5, 2.0)
    parts: dict[str, Any] = {
        # As published, but for its resolutions: those of the tiny videos.
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=16, max_image_seq_len=1024,
            shift_terminal=0.1,
        ),
        "vae": vae,
        "audio_vae": audio_vae,
        "text_encoder": Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)),
        "tokenizer": tokenizer,
        "connectors": connectors,
        "transformer": transformer,
        "vocoder": LTX2Vocoder(
            in_channels=2 * MEL_BINS, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
        ),
    }  # fmt: skip
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return LTX2Pipeline(**parts)
