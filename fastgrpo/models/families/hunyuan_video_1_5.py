"""HunyuanVideo 1.5 (rectified flow, text or image to video): Qwen2.5-VL's text, quoted words by ByT5, two branches.

diffusers' forward puts the tokens that are attended to first by boolean masks, which a GPU waits for. Here the host
knows how many each row has: it makes the order itself, and each row attends over its video and its own text alone, as
HunyuanVideo's do. A text-to-video model has no image tokens: its own forward masks all of them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.conditioning import to_device
from fastgrpo.models.families.hunyuan_video import HunyuanVideo
from fastgrpo.models.families.image import check_text_length
from fastgrpo.models.families.shared import guide, prompt_images
from fastgrpo.models.protocol import Conditioning, ModelFamily

# Tokens of the quoted words of a prompt, and of the picture that a video starts from, whatever they are.
GLYPH_TOKENS, IMAGE_TOKENS = 256, 729
# Rows of the embedding of what a token is of.
TEXT, GLYPHS, IMAGE = range(3)


class HunyuanVideo15(HunyuanVideo):
    name = "hunyuan_video_1_5"
    pipeline_classes = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
    image_pipelines = ("HunyuanVideo15ImageToVideoPipeline",)
    guidance_style = "cfg"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    block_lists = ("transformer_blocks",)
    host_names = ("text_length", "glyph_length")

    def __init__(self, pipeline: Any, *args: Any, **settings: Any) -> None:
        super().__init__(pipeline, *args, **settings)
        # Its autoencoder's attention takes one sample.
        pipeline.vae.enable_slicing()
        for module in self.modules.values():
            module.forward = MethodType(forward, module)

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        super().check(config, parts)
        check_text_length(config, 1000, cls.name)
        if parts["transformer"].get("use_meanflow"):
            raise ConfigError(
                f"model.path: the transformer of '{config.path}' is distilled to be told where each step ends "
                "(use_meanflow), which this family does not do; use the checkpoint that it was distilled from"
            )

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        from fastgrpo.shapes import moving_world, tiny_hunyuan_video_1_5

        return tiny_hunyuan_video_1_5.build_tokenizers(moving_world.vocabulary())

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        return ModelFamily.comfyui_layer(self, layer)

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        # Its guidance is the guider's (`pipeline_settings`); from an image, its size follows the image's.
        unknown = ("guidance_scale", "max_sequence_length", *(("height", "width") if self.takes_image else ()))
        return {key: value for key, value in super().pipeline_arguments(steps).items() if key not in unknown}

    def pipeline_settings(self) -> tuple[str, ...]:
        return (f"pipe.guider = pipe.guider.new(guidance_scale={self.config.guidance!r})",)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        settings: Any = self.denoiser.config
        text = self.config.max_sequence_length, settings.text_embed_dim
        shapes: dict[str, tuple[int, ...]] = {"text": text, "glyphs": (GLYPH_TOKENS, settings.text_embed_2_dim)}
        if not self.takes_image:
            return shapes
        channels, _, height, width = self.latent_shape
        return shapes | {"first_frame": (channels, 1, height, width), "image": (IMAGE_TOKENS, settings.image_embed_dim)}

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        pipeline, texts = self.encoder, [p.text for p in prompts]
        text, mask = pipeline._get_mllm_prompt_embeds(
            pipeline.text_encoder, pipeline.tokenizer, texts, self.device, self.config.max_sequence_length,
            system_message=pipeline.system_message, crop_start=pipeline.prompt_template_encode_start_idx,
        )  # fmt: skip
        glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(
            pipeline.tokenizer_2, pipeline.text_encoder_2, texts, self.device, GLYPH_TOKENS
        )
        encoded = {"text": text, "glyphs": glyphs, "text_length": mask.sum(1), "glyph_length": glyph_mask.sum(1)}
        return encoded | (self.encode_pictures(prompts) if self.takes_image else {})

    def encode_pictures(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`first_frame` [B, C, 1, h, w], latents, and `image` [B, tokens, D], what the image encoder sees."""
        frames, seen, size = [], [], {"height": self.config.height, "width": self.config.width}
        for picture in prompt_images(prompts, self.name):
            cropped = self.pipeline.video_processor.resize(picture, **size, resize_mode="crop")
            processor = self.pipeline.video_processor
            frames.append(
                self.pipeline._get_image_latents(self.pipeline.vae, processor, cropped, **size, device=self.device)
            )
            encoder = self.encoder
            seen.append(
                encoder._get_image_embeds(encoder.image_encoder, encoder.feature_extractor, cropped, self.device)
            )
        return {"first_frame": torch.cat(frames).float(), "image": torch.cat(seen)}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        # A channel says which frames are given.
        condition = torch.zeros(len(x), x.shape[1] + 1, *x.shape[2:], device=x.device)
        image = None
        if self.takes_image:
            image = conditioning["image"].to(self.dtype)
            condition[:, :-1, :1] = conditioning["first_frame"]
            condition[:, -1, 0] = 1
        inputs, times = torch.cat([x, condition], dim=1).to(self.dtype), time * 1000
        if self.guided:
            inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            image = None if image is None else torch.cat([image, image])
        output = (module or self.denoiser)(
            inputs,
            times,
            conditioning.branches("text", self.guided).to(self.dtype),
            conditioning.branches("glyphs", self.guided).to(self.dtype),
            image,
            conditioning.host_branches("text_length", self.guided),
            conditioning.host_branches("glyph_length", self.guided),
        )
        return guide(output, self.config.guidance) if self.guided else output


def forward(
    self: Any,
    x: Tensor,
    time: Tensor,
    text: Tensor,
    glyphs: Tensor,
    image: Tensor | None,
    text_length: np.ndarray,
    glyph_length: np.ndarray,
) -> Tensor:
    """The output of a HunyuanVideo15Transformer3DModel, of tokens that the host has put in order.

    Args:
        self: The transformer, with trimmed attention.
        x: Its channels, [B, C, F, h, w].
        time: Timesteps in 0 to 1000, float32 [B]; embedded in float32, and the embedding is rounded.
        text: [B, L, D], of which each row has `text_length` tokens.
        glyphs: [B, 256, D2], of which each row has `glyph_length`.
        image: [B, tokens, D3], or None.
        text_length: On the host, [B].
        glyph_length: On the host, [B].
    """
    rotary = self.rope(x)
    embedder = self.time_embed
    temb = embedder.timestep_embedder(embedder.time_proj(time).to(x.dtype))
    video = self.x_embedder(x)

    lengths = (glyph_length, text_length)
    valid = [
        np.arange(tokens.shape[1]) < length[:, None] for tokens, length in zip((glyphs, text), lengths, strict=True)
    ]
    refined = self.context_embedder(text, time, to_device(valid[1], x.device))
    parts = [(self.context_embedder_2(glyphs), GLYPHS), (refined, TEXT)]
    if image is not None:
        parts.insert(0, (self.image_embedder(image), IMAGE))
        valid.insert(0, np.ones(image.shape[:2], dtype=bool))
    tokens = torch.cat(
        [part + self.cond_type_embed(part.new_full(part.shape[:2], kind, dtype=torch.long)) for part, kind in parts],
        dim=1,
    )
    known = np.concatenate(valid, axis=1)
    order = to_device(np.argsort(~known, axis=1, kind="stable"), x.device)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    self.text_trim.lengths = known.sum(1).tolist()

    for block in self.transformer_blocks:
        video, tokens = block(video, tokens, temb, None, rotary)
    output = self.proj_out(self.norm_out(video, temb))
    # A token is a patch: its channels, then its frames, rows and columns.
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    counts = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    patches = output.unflatten(1, counts).unflatten(-1, (-1, *patch))
    return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
