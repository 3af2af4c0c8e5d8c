"""LTX-2 (rectified flow, text to video with sound): one transformer denoises both, and each sees the other.

A sample's latents are flat: the video's tokens, then the sound's. The policy is the video: sound is denoised beside it
without noise of its own, is kept with it at every trained step, and has no part in a log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.shared import guide, to_pixels
from fastgrpo.models.families.video import check_video_size, latent_frames, set_tiling
from fastgrpo.models.protocol import Conditioning, ModelFamily


class LTX2(ModelFamily):
    name = "ltx2"
    pipeline_classes = ("LTX2Pipeline",)
    guidance_style = "cfg"
    # The connectors make of Gemma's states what the transformer takes for text.
    encoders = ("text_encoder", "tokenizer", "connectors", "processor", "prompt_enhancer", "duration_head")
    optional_encoders = ("processor", "prompt_enhancer", "duration_head")
    block_lists = ("transformer_blocks",)

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        set_tiling(pipeline.vae, self.config)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        space, time = compression(parts["vae"])
        check_video_size(config, space, time)
        transformer = parts["transformer"]
        patches = {name: transformer.get(name, 1) for name in ("patch_size", "patch_size_t")}
        if set(patches.values()) != {1} or parts["vae"].get("timestep_conditioning"):
            raise ConfigError(
                f"model.path: '{config.path}' has patches of more than one latent, or an autoencoder that is told a "
                "timestep, which no published LTX-2 has and this family does not do"
            )

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import moving_world, tiny_ltx2

        return {"tokenizer": tiny_ltx2.build_tokenizer(moving_world.vocabulary(), length)}

    @cached_property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Latents of the video: channels, frames, rows, columns."""
        space, time = compression(self.pipeline.vae.config)
        rows, columns = self.config.height // space, self.config.width // space
        return self.pipeline.transformer.config.in_channels, latent_frames(self.config, time), rows, columns

    @cached_property
    def sound_shape(self) -> tuple[int, int]:
        """Tokens of the sound, and channels of each."""
        pipeline = self.pipeline
        rate = pipeline.audio_sampling_rate / pipeline.audio_hop_length / pipeline.audio_vae_temporal_compression_ratio
        return round(self.config.frames / self.config.fps * rate), pipeline.transformer.config.audio_in_channels

    @property
    def beside(self) -> int:
        tokens, channels = self.sound_shape
        return tokens * channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        channels, frames, rows, columns = self.video_shape
        return (channels * frames * rows * columns + self.beside,)

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift

        _, frames, rows, columns = self.video_shape
        settings = scheduler.config
        mu = calculate_shift(
            frames * rows * columns,
            settings.get("base_image_seq_len", 1024),
            settings.get("max_image_seq_len", 4096),
            settings.get("base_shift", 0.95),
            settings.get("max_shift", 2.05),
        )
        return super().timestep_arguments(scheduler, steps) | {"mu": mu}

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        # Training guides video and sound alike, by two branches and nothing else.
        apart = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        sound = {
            "audio_guidance_scale": self.config.guidance, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0,
            "audio_guidance_rescale": 0.0,
        }  # fmt: skip
        return super().pipeline_arguments(steps) | {"frame_rate": float(self.config.fps)} | apart | sound

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        widths = (settings.caption_channels, settings.caption_channels)
        if not settings.use_prompt_embeddings:
            widths = settings.cross_attention_dim, settings.audio_cross_attention_dim
        length = self.config.max_sequence_length
        return {"text": (length, widths[0]), "sound_text": (length, widths[1])}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`text` and `sound_text` [B, L, D]: learned registers stand where a prompt has ended, so there is no mask."""
        pipeline, length = self.encoder, self.config.max_sequence_length
        registers = pipeline.connectors.config.video_connector_num_learnable_registers
        if registers and length % registers:
            raise ConfigError(
                f"model.max_sequence_length: {length} is not a multiple of {registers}, the registers of the connectors"
            )
        states, mask = pipeline._get_gemma_prompt_embeds(
            [p.text for p in prompts], max_sequence_length=length, device=self.device
        )
        text, sound_text, _ = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"text": text, "sound_text": sound_text}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        channels, frames, rows, columns = self.video_shape
        inputs, times = x.to(self.dtype), time * 1000
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
        video, sound = inputs[:, : -self.beside], inputs[:, -self.beside :]
        # The timestep is embedded in float32, and the embedding is rounded. Video and sound stand at the same level.
        outputs = (module or self.denoiser)(
            hidden_states=video.unflatten(1, (-1, channels)),
            audio_hidden_states=sound.unflatten(1, self.sound_shape),
            encoder_hidden_states=conditioning.branches("text", self.guided).to(self.dtype),
            audio_encoder_hidden_states=conditioning.branches("sound_text", self.guided).to(self.dtype),
            timestep=times,
            sigma=times,
            num_frames=frames,
            height=rows,
            width=columns,
            fps=float(self.config.fps),
            audio_num_frames=self.sound_shape[0],
            return_dict=False,
        )
        output = torch.cat([part.flatten(1) for part in outputs], dim=1)
        return guide(output, self.config.guidance) if self.guided else output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae, (channels, frames, rows, columns) = self.pipeline.vae, self.video_shape
        tokens = self.of_policy(latents).unflatten(1, (frames, rows, columns, channels))
        video = self.pipeline._denormalize_latents(
            tokens.movedim(-1, 1), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        return to_pixels(vae.decode(video.to(self.vae_dtype), None, return_dict=False)[0])


def compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels and frames of a latent, of an AutoencoderKLLTX2Video's config."""
    halved = vae["spatio_temporal_scaling"]
    levels = len(vae["layers_per_block"]) - 1 if halved is True else sum(halved or ())
    given = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    return given[0] or vae["patch_size"] * 2**levels, given[1] or vae["patch_size_t"] * 2**levels
