"""Z-Image and Z-Image-Turbo (rectified flow, text to image): one stream of image and text, Qwen 3's text.

The transformer takes texts of any length, a list of rows, and pads each to a multiple of 32: other lengths would be
other shapes, and other bits. Here every text has model.max_sequence_length tokens; a mask that stays on the device says
where each ends, and positions of the image follow from it as its own forward has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZImageTransformer2DModel,
    ZSingleStreamAttnProcessor,
)
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.ulysses import group_of, own_tokens
from fastgrpo.models.families.image import (
    check_image_size,
    check_text_length,
    decode_latents,
    dynamic_mu,
    encode_pixels,
    vae_factor,
)
from fastgrpo.models.families.shared import guide
from fastgrpo.models.protocol import Conditioning, ModelFamily


class ZImage(ModelFamily):
    name = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    guidance_style = "cfg"
    # Its pipeline counts the scale from the prompt's branch: 0 is none.
    unguided_scale = 0.0
    encoders = ("text_encoder", "tokenizer")
    # Ring attention of diffusers takes no mask.
    context_kinds = ("ulysses",)
    block_lists = ("noise_refiner", "context_refiner", "layers")
    mask_names = ("mask",)

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        mask_text(pipeline.transformer)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, 2 * vae_factor(parts["vae"]), cls.name)
        # Positions of the image come after the text's.
        check_text_length(config, parts["transformer"]["axes_lens"][0] - SEQ_MULTI_OF, cls.name)

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        side = 2 * vae_factor(parts["vae"])
        image = (config.height // side) * (config.width // side)
        return [padded(image), padded(config.max_sequence_length)]

    def context_plan(self, module: nn.Module) -> Mapping[str, Any]:
        """`patchify` splits the tokens, and `unpatchify` puts the image's in order again once joined. diffusers
        has no plan of its own for it."""
        from diffusers.models._modeling_parallel import ContextParallelOutput

        return {"all_final_layer.2-1": ContextParallelOutput(gather_dim=1, expected_dims=3)}

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_parts, world

        return {"tokenizer": tiny_parts.build_chat_tokenizer(world.vocabulary(), length)}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, self.config.height // factor, self.config.width // factor

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        # A list, which not every scheduler takes: its pipeline's own.
        sigmas = get_default_z_image_sigmas(steps)
        return {"sigmas": sigmas, "mu": dynamic_mu(scheduler.config, (height // 2) * (width // 2))}

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return f"transformer.{layer}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        tokens = padded(self.config.max_sequence_length)
        return {"text": (tokens, settings.cap_feat_dim), "mask": (tokens,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`text` [B, L, D], zero where a prompt has ended, and `mask` [B, L], bool."""
        texts, _ = self.encoder.encode_prompt(
            [p.text for p in prompts],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        length = padded(self.config.max_sequence_length)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        return {
            "text": torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts]),
            "mask": torch.arange(length, device=self.device) < lengths[:, None],
        }

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        model: Any = module or self.denoiser
        inputs, times = x.to(self.dtype)[:, :, None], 1 - time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
        model.text_mask.real = conditioning.branches("mask", self.guided)
        # The timestep is embedded in float32, and the embedding is rounded.
        rows = model(
            list(inputs),
            times,
            list(conditioning.branches("text", self.guided).to(self.dtype)),
            return_dict=False,
        )[0]
        output = -torch.stack(list(rows))[:, :, 0]
        return guide(output, 1 + self.config.guidance) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.pipeline.vae, latents, self.vae_dtype)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return encode_pixels(self.pipeline.vae, images, self.vae_dtype, generator)


def padded(tokens: int) -> int:
    """How many tokens the transformer makes of a sequence."""
    return tokens + -tokens % SEQ_MULTI_OF


class TextMask:
    """Which text tokens of each row are a prompt's, [B, L], bool, and which are attended to: those that the transformer
    pads a text of its length with, too.

    A backward pass with activation checkpointing reads it again, so it must come before the next forward.
    """

    real: Tensor

    @property
    def ends(self) -> Tensor:
        """How many text tokens of each row are attended to, [B, 1]."""
        lengths = self.real.sum(1, keepdim=True)
        return lengths + -lengths % SEQ_MULTI_OF

    def attended(self, tokens: int, size: int) -> Tensor:
        """[B, size · tokens], bool, of a sequence of which each of `size` ranks has `tokens`, its part of the text at
        their end: all that is no text is attended to."""
        own = self.real.shape[1] // size
        place = torch.arange(tokens, device=self.real.device) - (tokens - own)
        return torch.cat([place < (self.ends - rank * own).clamp(min=0) for rank in range(size)], dim=1)


class MaskedAttention(ZSingleStreamAttnProcessor):
    """The transformer's own attention, with a mask of the text."""

    def __init__(self, mask: TextMask) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        # Of all ranks: their tokens meet in the attention.
        mask = self.mask.attended(hidden_states.shape[1], group_of(self._parallel_config)[1])
        return super().__call__(attn, hidden_states, attention_mask=mask, freqs_cis=freqs_cis)


def mask_text(transformer: Any) -> None:
    """Gives a Z-Image transformer `text_mask`, by which it treats texts padded to one length as if they were not."""
    transformer.text_mask = TextMask()
    for block in (*transformer.context_refiner, *transformer.layers):
        block.attention.set_processor(MaskedAttention(transformer.text_mask))
    transformer.patchify_and_embed = MethodType(patchify, transformer)
    transformer.unpatchify = MethodType(unpatchify, transformer)


def context_of(model: Any) -> tuple[int, int]:
    """How many ranks share every sample's tokens, and which of them this is."""
    return group_of(model.layers[0].attention.processor._parallel_config)[1:]


def patchify(model: Any, images: list[Tensor], texts: list[Tensor], *patch: int) -> tuple[list[Any], ...]:
    """The transformer's own patches, with the padding and positions of texts that end where `text_mask` says."""
    patches, texts, sizes, positions, text_positions, pads, _ = ZImageTransformer2DModel.patchify_and_embed(
        model, images, texts, *patch
    )
    # The image's first position follows the text's last: nearer where the text is shorter. Its padding stands at 0.
    nearer = (model.text_mask.real.shape[1] - model.text_mask.ends).to(torch.int32)
    first_axis = torch.arange(3, device=nearer.device) == 0
    positions = [p - by * (first_axis & (p[:, :1] > 0)) for p, by in zip(positions, nearer, strict=True)]
    size, rank = context_of(model)
    split = (patches, texts, positions, text_positions, pads, list(~model.text_mask.real))
    patches, texts, positions, text_positions, pads, text_pads = (
        [own_tokens(row, 0, size, rank) for row in rows] for rows in split
    )
    return patches, texts, sizes, positions, text_positions, pads, text_pads


def unpatchify(model: Any, rows: list[Tensor], *sizes: Any) -> list[Tensor]:
    """The transformer's own images of rows [S, C], each the image's tokens and then the text's, of every rank."""
    size, _ = context_of(model)
    if size > 1:
        image = (len(rows[0]) - model.text_mask.real.shape[1]) // size
        rows = [row.unflatten(0, (size, -1))[:, :image].flatten(0, 1) for row in rows]
    return ZImageTransformer2DModel.unpatchify(model, rows, *sizes)
