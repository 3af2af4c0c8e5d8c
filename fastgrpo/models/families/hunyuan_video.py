"""HunyuanVideo (rectified flow, text to video): Llama text behind a template, pooled CLIP, embedded guidance.

Padding is never attended to and no mask is built: each row attends over its video and its own text alone, so that any
attention backend can serve, and a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.ulysses import all_heads, group_of, heads_to_tokens, own_heads, tokens_to_heads
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.image import CLIP_TOKENS
from fastgrpo.models.families.shared import to_pixels
from fastgrpo.models.families.video import check_video_size, latent_frames, set_tiling, video_tokens
from fastgrpo.models.protocol import Conditioning, ModelFamily

# Layers under the names of HunyuanVideo's own model, which ComfyUI has: a pattern, the name, and the layers that its
# matrix joins where it is not one layer's.
COMFYUI_LAYERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn_qkv",
     tuple(rf"transformer_blocks.\1.attn.to_{x}" for x in "qkv")),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn_qkv",
     tuple(rf"transformer_blocks.\1.attn.add_{x}_proj" for x in "qkv")),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn_proj", ()),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn_proj", ()),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1", ()),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.fc2", ()),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1", ()),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2", ()),
    (r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1",
     (*(rf"single_transformer_blocks.\1.attn.to_{x}" for x in "qkv"), r"single_transformer_blocks.\1.proj_mlp")),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2", ()),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_[qkv]",
     r"txt_in.individual_token_refiner.blocks.\1.self_attn_qkv",
     tuple(rf"context_embedder.token_refiner.refiner_blocks.\1.attn.to_{x}" for x in "qkv")),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0",
     r"txt_in.individual_token_refiner.blocks.\1.self_attn_proj", ()),
)  # fmt: skip


class HunyuanVideo(ModelFamily):
    name = "hunyuan_video"
    pipeline_classes = ("HunyuanVideoPipeline",)
    guidance_style = "embedded"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    context_kinds = ("ulysses",)
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    host_names = ("text_length",)

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        set_tiling(pipeline.vae, self.config)
        for module in self.modules.values():
            trim_attention(module)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        vae, patch = parts["vae"], parts["transformer"]["patch_size"]
        # Its pipeline refuses other sizes, whatever the VAE's own factor.
        multiple = int(np.lcm(16, vae["spatial_compression_ratio"] * patch))
        check_video_size(config, multiple, vae["temporal_compression_ratio"])

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        vae, transformer = parts["vae"], parts["transformer"]
        patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
        return [video_tokens(config, vae["spatial_compression_ratio"], vae["temporal_compression_ratio"], patch)]

    def context_plan(self, module: nn.Module) -> Mapping[str, Any]:
        """Video tokens and their positions are split once they are embedded, and joined at the end; every rank has the
        text (`TrimmedAttention` exchanges heads). diffusers has no plan of its own for this model."""
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        def after(dim: int, dims: int) -> Any:
            return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)

        return {
            "x_embedder": {0: after(1, 3)},
            "rope": {0: after(0, 2), 1: after(0, 2)},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        from fastgrpo.shapes import moving_world, tiny_hunyuan_video, tiny_parts

        words, whole = moving_world.vocabulary(), DEFAULT_PROMPT_TEMPLATE["crop_start"] + length
        template = tiny_hunyuan_video.build_tokenizer(words, whole, template=True)
        return {"tokenizer": template, "tokenizer_2": tiny_parts.build_tokenizer(words, CLIP_TOKENS, start=True)}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        vae = self.pipeline.vae.config
        factor, frames = vae.spatial_compression_ratio, latent_frames(self.config, vae.temporal_compression_ratio)
        return vae.latent_channels, frames, self.config.height // factor, self.config.width // factor

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        for pattern, key, joined in COMFYUI_LAYERS:
            if match := re.fullmatch(pattern, layer):
                parts = tuple(match.expand(part) for part in joined) or (layer,)
                return f"diffusion_model.{match.expand(key)}", parts
        raise ConfigError(f"model.lora.targets: '{layer}' has no name in ComfyUI; leave out --comfyui")

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        text = self.config.max_sequence_length, settings.text_embed_dim
        return {"text": text, "pooled": (settings.pooled_projection_dim,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        text, pooled, mask = self.encoder.encode_prompt(
            [p.text for p in prompts], device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return {"text": text, "pooled": pooled, "text_length": mask.sum(1)}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        return self.evaluate(x, time, conditioning, module, self.config.guidance, guided=False)

    def evaluate(
        self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None, guidance: float,
        guided: bool,
    ) -> Tensor:  # fmt: skip
        """The model output [B, …], of both branches [2B, …], negatives first, if `guided`; guidance: embedded scale."""
        model: Any = module or self.denoiser
        text = conditioning.branches("text", guided).to(self.dtype)
        lengths = conditioning.host_branches("text_length", guided)
        model.text_trim.lengths = lengths.tolist()
        # The mask is read for the mean of the text alone, by the text refiner.
        mask = torch.arange(text.shape[1])[None] < torch.from_numpy(lengths)[:, None]
        # Timesteps and guidance are embedded in float32, and the embedding is rounded.
        return model(
            hidden_states=x.to(self.dtype),
            timestep=time * 1000,
            encoder_hidden_states=text,
            encoder_attention_mask=mask.to(x.device, non_blocking=True),
            pooled_projections=conditioning.branches("pooled", guided).to(self.dtype),
            guidance=torch.full_like(time, guidance * 1000) if model.config.guidance_embeds else None,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return to_pixels(vae.decode((latents / vae.config.scaling_factor).to(self.vae_dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = self.pipeline.vae
        drawn = vae.encode((images * 2 - 1).to(self.vae_dtype)).latent_dist.sample(generator)
        return drawn.float() * vae.config.scaling_factor


class TextTrim:
    """How many text tokens of each row are real: set before a forward, read by every attention of the same module.

    A backward pass with activation checkpointing reads it again, so it must come before the next forward.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []


class TrimmedAttention:
    """Attention over a row's video tokens and its first `lengths[row]` text tokens; zeros where text is padding."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, trim: TextTrim) -> None:
        self.trim = trim

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, text, split = hidden_states, encoder_hidden_states, hidden_states.shape[1]
        layers = ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
        added = ((attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None))
        # A single-stream block has the same projections for both.
        added = layers if attn.add_q_proj is None else added
        query, key, value = (
            torch.cat([heads(attn, video, *own, image_rotary_emb), heads(attn, text, *other, None)], dim=1)
            for own, other in zip(layers, added, strict=True)
        )
        # With context parallelism, the tokens of all ranks for this rank's heads from here to the attention's output.
        group, size, rank = group_of(self._parallel_config)
        if size > 1:
            query, key, value = (
                torch.cat([tokens_to_heads(x[:, :split], group, size), own_heads(x[:, split:], size, rank)], dim=1)
                for x in (query, key, value)
            )
        whole = split * size
        # Rows side by side with texts of one length attend in one call. Split, not sliced: the gradient of a slice is
        # as large as the whole, once for every call.
        runs = [(length, len(list(rows))) for length, rows in itertools.groupby(self.trim.lengths)]
        parts = zip(*(x.split([count for _, count in runs]) for x in (query, key, value)), runs, strict=True)
        rows = [self.attend(q, k, v, whole + length) for q, k, v, (length, _) in parts]
        video, text = torch.cat(rows).split([whole, text.shape[1]], dim=1)
        video = heads_to_tokens(video, group, size).flatten(2)
        text = all_heads(text, group, size).flatten(2)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.to_add_out is None else attn.to_add_out(text)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, end: int) -> Tensor:
        output = dispatch_attention_fn(
            query[:, :end],
            key[:, :end],
            value[:, :end],
            backend=self._attention_backend,
        )
        return F.pad(output.to(query.dtype), (0, 0, 0, 0, 0, query.shape[1] - end))


def heads(
    attn: Any, x: Tensor, projection: nn.Module, norm: nn.Module | None, rotary: tuple[Tensor, Tensor] | None
) -> Any:
    """[B, S, heads, width] of tokens [B, S, D]; queries and keys, which have a norm, are rotated."""
    projected = projection(x).unflatten(2, (attn.heads, -1))
    if norm is None:
        return projected
    normed = norm(projected)
    if rotary is None:
        return normed
    return apply_rotary_emb(normed, rotary, sequence_dim=1)  # pyright: ignore[reportArgumentType]


def trim_attention(transformer: Any) -> None:
    """Gives every joint attention of a HunyuanVideo transformer the trimmed form, and the transformer `text_trim`."""
    transformer.text_trim = TextTrim()
    for block in (*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())):
        block.attn.set_processor(TrimmedAttention(transformer.text_trim))
