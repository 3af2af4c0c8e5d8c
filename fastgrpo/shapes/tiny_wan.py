"""Tiny random Wan pipelines of the real classes: 2.1, 2.2 5B, from an image, of two transformers; a closed vocabulary.

`WanPipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from fastgrpo.shapes.tiny_hunyuan_video import build_tokenizer

TEXT_LENGTH = 512


def build_pipeline(
    words: tuple[str, ...], seed: int, from_image: bool = False, per_token: bool = False, two: bool = False
) -> Any:
    """An untrained pipeline in float32 whose tokenizer knows `words`, and whose output is not nearly zero; resets
    torch's global seed.

    from_image: the first frame is given. per_token: as the 5B of 2.2, which tells the time of each token, in a VAE of
    48 channels. two: two transformers, one for each part of the noise levels, as the 14B of 2.2.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(words, TEXT_LENGTH, template=False)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    z = 48 if per_token else 16
    # Only 2.1's image to video also takes what an image encoder sees.
    image_dim = 32 if from_image and not (per_token or two) else None
    given = 4 + z if from_image and not per_token else 0
    transformers = [_transformer(z, given, image_dim) for _ in range(2 if two else 1)]
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(text),
        "vae": AutoencoderKLWan(
            base_dim=8, z_dim=z, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * z, latents_std=[1.5] * z,
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        "transformer": transformers[0],
        "transformer_2": transformers[1] if two else None,
        "boundary_ratio": 0.8 if two else None,
        "expand_timesteps": per_token,
    }  # fmt: skip
    if image_dim:
        parts |= _image_encoder()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return (WanImageToVideoPipeline if from_image else WanPipeline)(**parts)


def _transformer(channels: int, given: int, image_dim: int | None) -> WanTransformer3DModel:
    """given: channels beside the noise, of the first frame and its mask. image_dim: of the encoded first frame."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=channels + given,
        out_channels=channels, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True,
        image_dim=image_dim, rope_max_seq_len=64, added_kv_proj_dim=image_dim,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    return transformer


def _image_encoder() -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    size = {"height": 32, "width": 32}
    return {
        "image_encoder": CLIPVisionModel(vision),
        "image_processor": CLIPImageProcessorPil(size=size, crop_size=size),
    }
