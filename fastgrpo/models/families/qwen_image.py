"""Qwen-Image (rectified flow, text to image): packed latents, a language model's text, guidance that keeps the norm.

Text is padded to model.max_sequence_length, and a mask that stays on the device keeps the padding out of attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.ulysses import group_of
from fastgrpo.models.families.image import check_image_size, check_text_length, dynamic_mu
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.protocol import Conditioning, ModelFamily


class QwenImage(ModelFamily):
    name = "qwen_image"
    pipeline_classes = ("QwenImagePipeline",)
    guidance_style = "cfg"
    encoders = ("text_encoder", "tokenizer")
    # Ring attention of diffusers takes no mask.
    context_kinds = ("ulysses",)
    block_lists = ("transformer_blocks",)
    mask_names = ("mask",)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        check_image_size(config, 2 * 2 ** len(parts["vae"]["temperal_downsample"]), cls.name)
        check_text_length(config, 1024, cls.name)

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """The image's; `texts` pads the text to what divides."""
        side = 2 * 2 ** len(parts["vae"]["temperal_downsample"])
        return [(config.height // side) * (config.width // side)]

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import tiny_parts, tiny_qwen_image, world

        whole, template = tiny_qwen_image.TEMPLATE_START + length, tiny_qwen_image.TEMPLATE
        return {"tokenizer": tiny_parts.build_template_tokenizer(world.vocabulary(), whole, template)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens: the VAE's factor times 2×2 packing."""
        side = self.pipeline.vae_scale_factor * 2
        return self.config.height // side, self.config.width // side

    @property
    def latent_shape(self) -> tuple[int, ...]:
        rows, columns = self.grid
        return rows * columns, self.pipeline.transformer.config.in_channels

    @cached_property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, [1, C, 1, 1, 1]."""
        vae = self.pipeline.vae.config
        mean, std = (torch.tensor(v, device=self.device) for v in (vae.latents_mean, vae.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        given = super().timestep_arguments(scheduler, steps)
        return given | {"mu": dynamic_mu(scheduler.config, self.latent_shape[0])}

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        called = super().pipeline_arguments(steps)
        return called | {"true_cfg_scale": called.pop("guidance_scale")}

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return f"transformer.{layer}", (layer,)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        tokens = self.config.max_sequence_length
        return {"text": (tokens, settings.joint_attention_dim), "mask": (tokens,)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`text` [B, L, D], zero where a prompt has ended, and `mask` [B, L], bool.

        The pipeline pads to a batch's longest prompt, and other lengths give other bits: here the length is constant.
        """
        pipeline = self.encoder
        cut = pipeline.prompt_template_encode_start_idx
        tokens = pipeline.tokenizer(
            [pipeline.prompt_template_encode.format(p.text) for p in prompts],
            max_length=cut + self.config.max_sequence_length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        output = pipeline.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        )
        text, mask = output.hidden_states[-1][:, cut:], tokens.attention_mask[:, cut:].bool()
        return {"text": text * mask[..., None], "mask": mask}

    def texts(self, conditioning: Conditioning, model: Any) -> tuple[Tensor, Tensor]:
        """`text` and `mask` of the branches, with as much more padding as context parallelism needs to split them."""
        text = conditioning.branches("text", self.guided).to(self.dtype)
        mask = conditioning.branches("mask", self.guided)
        _, size, _ = group_of(model.transformer_blocks[0].attn.processor._parallel_config)
        more = -text.shape[1] % size
        return F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        # An edit's source stands behind the noisy latents.
        edit = self.image_encoding == "source"
        inputs, times = (torch.cat([x, conditioning["source"]], dim=1) if edit else x).to(self.dtype), time
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([time, time])
        model = module or self.denoiser
        text, mask = self.texts(conditioning, model)
        # The transformer rounds the timestep to its input's dtype itself (diffusers' Qwen-Image), as FLUX's does.
        output = model(
            hidden_states=inputs,
            timestep=times,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *self.grid)] * (1 + edit)] * len(inputs),
            return_dict=False,
        )[0][:, : x.shape[1]]
        return guide(output, self.config.guidance, rescale_norm=True) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae, (mean, std) = self.pipeline.vae, self.latent_statistics
        unpacked = self.pipeline._unpack_latents(
            latents, self.config.height, self.config.width, self.pipeline.vae_scale_factor
        )
        return to_pixels(vae.decode((unpacked * std + mean).to(self.vae_dtype), return_dict=False)[0][:, :, 0])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae, (mean, std) = self.pipeline.vae, self.latent_statistics
        drawn = vae.encode((images * 2 - 1).to(self.vae_dtype)[:, :, None]).latent_dist.sample(generator).float()
        scaled = ((drawn - mean) / std)[:, :, 0]
        return self.pipeline._pack_latents(scaled, *scaled.shape)
