"""A FLUX.2-klein pipeline of about a million parameters: diffusers' and transformers' own classes, a closed vocabulary.

`Flux2KleinPipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator
from transformers import Qwen3ForCausalLM

from fastgrpo.config.sections import Section
from fastgrpo.errors import ConfigError
from fastgrpo.shapes.tiny_parts import build_chat_tokenizer, build_qwen3

# The last of the layers whose outputs its pipeline takes as text, and so the fewest that an encoder has.
TEXT_LAYERS = 27


class TinyFlux2Sizes(Section):
    """Sizes of the tiny FLUX.2-klein."""

    image_size: int = 32
    # Of a prompt's words and the chat template's, of which there are eighteen.
    text_length: int = 28
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    attention_heads: int = 4
    rope_axes: list[int] = Field(default_factory=lambda: [4, 8, 8, 4])
    layers: int = 2
    single_layers: int = 2
    text_width: int = 32
    # None: by the number of tokens, as published.
    shift: float | None = None
    # Of a checkpoint that is distilled to a few steps without guidance.
    distilled: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TinyFlux2Sizes":
        if self.text_width % 16:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 16, the width of a head")
        return self


def build_pipeline(words: tuple[str, ...], sizes: TinyFlux2Sizes, seed: int) -> Flux2KleinPipeline:
    """An untrained Flux2KleinPipeline in float32 whose tokenizer knows `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    tokenizer = build_chat_tokenizer(words, sizes.text_length)
    blocks = len(sizes.vae_channels)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(sizes.vae_channels),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=sizes.image_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # What its latents' statistics are, of a VAE that is trained.
    norm: Any = vae.bn
    torch.nn.init.normal_(norm.running_mean, std=0.5)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.layers,
        num_single_layers=sizes.single_layers,
        attention_head_dim=sum(sizes.rope_axes),
        num_attention_heads=sizes.attention_heads,
        joint_attention_dim=3 * sizes.text_width,
        axes_dims_rope=tuple(sizes.rope_axes),
        guidance_embeds=False,
    )
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=sizes.shift or 3.0, use_dynamic_shifting=sizes.shift is None
        ),
        "vae": vae,
        "text_encoder": build_qwen3(Qwen3ForCausalLM, sizes.text_width, TEXT_LAYERS, len(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return Flux2KleinPipeline(**parts, is_distilled=sizes.distilled)
