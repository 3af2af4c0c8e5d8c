"""SkyReels-V1-Hunyuan-I2V (rectified flow, image to video): HunyuanVideo with a first frame beside the noise.

The first frame's latent is concatenated to the latents' channels; guided by two branches (true CFG) while the
embedded guidance stays at 1, as its pipeline has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.hunyuan_video import HunyuanVideo
from fastgrpo.models.families.shared import guide
from fastgrpo.models.families.video import first_frames
from fastgrpo.models.protocol import Conditioning

EMBEDDED_GUIDANCE = 1.0


class SkyReels(HunyuanVideo):
    name = "skyreels"
    pipeline_classes = ("HunyuanSkyreelsImageToVideoPipeline",)
    guidance_style = "cfg"
    image_pipelines = pipeline_classes
    image_encoding = "first_frame"

    @classmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        super().check(config, parts)
        channels, latent = parts["transformer"]["in_channels"], parts["vae"]["latent_channels"]
        if channels != 2 * latent:
            raise ConfigError(
                f"model.path: the transformer of '{config.path}' takes {channels} channels, not {2 * latent} (latents "
                "and a first frame); the family of a text-to-video model is hunyuan_video"
            )

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        channels, _, height, width = self.latent_shape
        return super().encoded_shapes() | {"first_frame": (channels, 1, height, width)}

    def encode_texts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return super().encode_prompts(prompts)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        vae = self.pipeline.vae
        pixels = first_frames(self.pipeline, prompts, self.config, self.device).to(vae.dtype)
        # A posterior sample, as its pipeline draws, the same every time.
        latents = [
            vae.encode(image[None, :, None]).latent_dist.sample(torch.Generator().manual_seed(0)) for image in pixels
        ]
        first = torch.cat(latents).float() * vae.config.scaling_factor
        return {**self.encode_texts(prompts), "first_frame": first}

    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        # The branches have the same first frame: a negative prompt keeps its prompt's image.
        first = F.pad(conditioning["first_frame"], (0, 0, 0, 0, 0, x.shape[2] - 1))
        inputs = torch.cat([x, first], dim=1)
        if not self.guided:
            return self.evaluate(inputs, time, conditioning, module, EMBEDDED_GUIDANCE, guided=False)
        both = torch.cat([inputs, inputs])
        output = self.evaluate(both, torch.cat([time, time]), conditioning, module, EMBEDDED_GUIDANCE, guided=True)
        return guide(output, self.config.guidance)

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        called = super().pipeline_arguments(steps)
        return called | {"true_cfg_scale": called["guidance_scale"], "guidance_scale": EMBEDDED_GUIDANCE}
