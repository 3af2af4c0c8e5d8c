"""Qwen-Image 2.1 (rectified flow, text to image): one causal stream of text and image, Qwen 3 VL's text.

diffusers' forward reads masks on the host to lay out text and images, and pads texts to the longest beside them. Here
text has model.max_sequence_length tokens and then comes the image, so the layout is known; a mask that stays on the
device says where a text ends, and the image's position follows from it. Pictures have four channels: transparent parts
are shown over white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.ulysses import group_of, heads_to_tokens, own_tokens, tokens_to_heads
from fastgrpo.models.families.image import check_image_size, check_text_length, dynamic_mu
from fastgrpo.models.families.qwen_image import QwenImage
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.loading import resolve_path
from fastgrpo.models.protocol import Conditioning, ModelFamily
from fastgrpo.shapes.image_text import ImageTextProcessor

# Pixels of a token, along a side.
TOKEN_SIDE = 16


class QwenImage21(QwenImage):
    name = "qwen_image_2_1"
    pipeline_classes = ("QwenImage21Pipeline",)
    encoders = ("text_encoder",)
    reads_tokenizer = True

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        causal(pipeline.transformer)

    @classmethod
    def own_parts(cls, config: Model) -> dict[str, Any]:
        return {"processor": ImageTextProcessor.of_directory(resolve_path(config.path))}

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, 2 * TOKEN_SIDE, cls.name)
        check_text_length(config, 4096, cls.name)

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        return [(config.height // TOKEN_SIDE) * (config.width // TOKEN_SIDE), config.max_sequence_length]

    def context_plan(self, module: nn.Module) -> Mapping[str, Any]:
        """`forward` splits the tokens; the image's are joined at the end. diffusers has no plan of its own for it."""
        from diffusers.models._modeling_parallel import ContextParallelOutput

        return {"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_qwen_image_2_1, world

        return {"processor": tiny_qwen_image_2_1.build_processor(world.vocabulary())}

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.height // TOKEN_SIDE, self.config.width // TOKEN_SIDE

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        given = super().timestep_arguments(scheduler, steps)
        # A pipeline may name its levels, whatever it is asked for.
        named = self.pipeline.config.sample_sigmas
        return given | {"mu": dynamic_mu(scheduler.config, self.latent_shape[0])} | ({"sigmas": named} if named else {})

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        called = super().pipeline_arguments(steps)
        del called["max_sequence_length"]
        return called

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return ModelFamily.comfyui_layer(self, layer)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        tokens = self.config.max_sequence_length
        return {"text": (tokens, settings.context_in_dim), "mask": (tokens,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`text` [B, L, D], zero where a prompt has ended, and `mask` [B, L], bool.

        One prompt at a time: the encoder sees other positions beside a longer one.
        """
        length, texts = self.config.max_sequence_length, []
        for prompt in prompts:
            text, _, _ = self.encoder._get_qwen_prompt_embeds([prompt.text], device=self.device)
            texts.append(text[0, :length])
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        return {
            "text": torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts]),
            "mask": torch.arange(length, device=self.device) < lengths[:, None],
        }

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        inputs, times = x.to(self.dtype), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        text = conditioning.branches("text", self.guided).to(self.dtype)
        mask = conditioning.branches("mask", self.guided)
        output = (module or self.denoiser)(inputs, times, text, mask, self.grid)
        return guide(output, self.config.guidance) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae, (mean, std) = self.pipeline.vae, self.latent_statistics
        unpacked = latents.transpose(1, 2).unflatten(2, (1, *self.grid))
        pixels = to_pixels(vae.decode((unpacked * std + mean).to(self.vae_dtype), return_dict=False)[0][:, :, 0])
        opaque = pixels[:, 3:]
        return pixels[:, :3] * opaque + (1 - opaque)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae, (mean, std) = self.pipeline.vae, self.latent_statistics
        pixels = F.pad(images, (0, 0, 0, 0, 0, 1), value=1.0) * 2 - 1
        drawn = vae.encode(pixels.to(self.vae_dtype)[:, :, None]).latent_dist.sample(generator).float()
        return ((drawn - mean) / std).flatten(2).transpose(1, 2)


class CausalAttention:
    """Text attends to the text before it, the image to all of itself and its row's text: two calls of attention."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Any = None, key_valid: Any = None, segments: Any = None,
        **unused: Any,
    ) -> Tensor:  # fmt: skip
        """rotary_emb: [B, S, 1, D / 2], complex; key_valid: [B, 1, 1, S of all ranks], bool; segments: how many tokens
        are text."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        normed = attn.norm_q(query), attn.norm_k(key)
        query, key = (rotate(x, rotary_emb).to(value.dtype) for x in normed)
        # With context parallelism, the tokens of all ranks for this rank's heads from here to the attention's output.
        group, size, _ = group_of(self._parallel_config)
        if size > 1:
            query, key, value = (
                torch.cat([tokens_to_heads(part, group, size) for part in (x[:, :segments], x[:, segments:])], dim=1)
                for x in (query, key, value)
            )
        count = segments * size
        text = dispatch_attention_fn(
            query[:, :count], key[:, :count], value[:, :count], is_causal=True, backend=self._attention_backend
        )
        image = dispatch_attention_fn(
            query[:, count:], key, value, attn_mask=key_valid, backend=self._attention_backend
        )
        output = torch.cat([heads_to_tokens(x, group, size) for x in (text, image)], dim=1).flatten(2).to(value.dtype)
        return attn.to_out[1](attn.to_out[0](output))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """[B, S, H, D] turned by [B, S, 1, D / 2], in float32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * rotary
    return torch.view_as_real(turned).flatten(3)


def causal(transformer: Any) -> None:
    """Gives a Qwen-Image 2.1 transformer the attention and the forward that ask nothing of the device."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(CausalAttention())
    transformer.forward = MethodType(forward, transformer)


def rotary_of(model: Any, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rotary embedding of texts and then an image, [B, L + N, 1, D / 2], complex.

    A text's tokens advance along all three axes; the image stands where its row's text ends, its rows and columns
    around 0.
    """
    (height, width), device = grid, mask.device

    def turns(axis: int, positions: Tensor) -> Tensor:
        dim = model.config.axes_dims_rope[axis]
        rates = 1.0 / torch.pow(model.pos_embed.theta, torch.arange(0, dim, 2, device=device).float() / dim)
        angles = torch.outer(positions.float(), rates)
        return torch.polar(torch.ones_like(angles), angles)

    place = torch.arange(mask.shape[1], device=device)
    text = torch.cat([turns(axis, place) for axis in range(3)], dim=-1)
    down = turns(1, torch.arange(-(height - height // 2), height // 2, device=device))
    right = turns(2, torch.arange(-(width - width // 2), width // 2, device=device))
    flat = torch.cat([down.repeat_interleave(width, dim=0), right.repeat(height, 1)], dim=-1)
    start = turns(0, mask.sum(1))[:, None].expand(-1, height * width, -1)
    image = torch.cat([start, flat.expand(len(mask), -1, -1)], dim=-1)
    return torch.cat([text.expand(len(mask), -1, -1), image], dim=1)[:, :, None]


def forward(self: Any, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The output [B, N, C] of a QwenImage21Transformer2DModel for noisy latents x [B, N, C] of `grid` rows and columns.

    Args:
        self: The transformer, with causal attention.
        x: Latents, in the compute dtype.
        time: Noise levels in 0 to 1, float32 [B]; embedded in float32, and the embedding is rounded.
        text: [B, L, D].
        mask: Which of the text's tokens are a prompt's, bool [B, L].
        grid: Rows and columns of the image's tokens.
    """
    _, size, rank = group_of(self.transformer_blocks[0].attn.processor._parallel_config)
    # Each rank has as much of the text as of the image, so that none waits for another.
    rotary = rotary_of(self, mask, grid).split([text.shape[1], x.shape[1]], dim=1)
    valid = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]
    text, x, *turns = (own_tokens(part, 1, size, rank) for part in (text, x, *rotary))
    count, image = text.shape[1], x.shape[1]
    tokens = torch.cat([self.txt_in(text), self.img_in(x)], dim=1)
    # Text is told that it is clean: a row of level 0 for all.
    levels = torch.cat([time, time.new_zeros(1)]) if self.config.causal_condition else time
    temb = self.time_text_embed(levels, tokens)
    modulation = self.modulation(temb)
    noisy = torch.arange(count + image, device=x.device) >= count if self.config.causal_condition else None
    for block in self.transformer_blocks:
        tokens = block(tokens, modulation, torch.cat(turns, dim=1), None, noisy, None, None, None, count, valid)
    return self.proj_out(self.norm_out(tokens, temb, noisy)[:, count:])
