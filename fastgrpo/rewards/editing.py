"""Rewards of edits: the editing world's verifier, and how much of the source is preserved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.data.prompts import Prompt, open_image
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import source_images
from fastgrpo.rewards.neural import options
from fastgrpo.shapes.editing_render import EditScenes, scene_of
from fastgrpo.shapes.editing_verifier import verify
from fastgrpo.shapes.editing_world import parse_image


class EditingReward:
    """The editing world's verdict in [0, 1] on edited images [B, 3, S, S]; components `strict` (1 where the edit is
    done and nothing else has changed), `edit` and `preserve`.

    A prompt whose image is none of the world's, and an image that holds a NaN, make a sample invalid.
    """

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        valid = np.array([_known(p) for p in prompts])
        columns = {name: np.zeros(len(prompts)) for name in ("score", "strict", "edit", "preserve")}
        if valid.any():
            names = [p.image for p, known in zip(prompts, valid, strict=True) if known and p.image is not None]
            scenes = EditScenes.concatenate([scene_of(name, samples.shape[-1]) for name in names])
            verdict = verify(samples.cpu().numpy()[valid], [parse_image(name)[0] for name in names], scenes)
            for name, column in columns.items():
                column[valid] = getattr(verdict, name)
        values = columns.pop("score")
        return Scores(values, valid & np.isfinite(values), columns)


def _known(prompt: Prompt) -> bool:
    """Whether the prompt is an edit of the world: of its own source image."""
    try:
        return prompt.image is not None and parse_image(prompt.image)[0].text == prompt.text
    except ValueError:
        return False


class PreserveReward:
    """1 − distance / limit, not below 0, from the source image where nothing should change; component `distance`.

    The distance is the mean absolute difference of pixels in [0, 1], after an average over squares of `cell` pixels.
    What may change: where the mask that the prompt's metadata names under `mask` is light (an image file of any size,
    its path relative to the folder of the prompt's image); without one, the `changed` share of the squares that
    differ most.

    cell: pixels a side; it should divide the samples' sides. changed: in [0, 1), of prompts without a mask. limit: the
    distance at which nothing counts as preserved. mask: the key of the metadata.
    """

    @options
    def __init__(self, cell: int = 8, changed: float = 0.25, limit: float = 0.25, mask: str = "mask") -> None:
        if cell < 1 or not 0 <= changed < 1 or limit <= 0:
            raise ConfigError("changed: must be at least 0 and below 1; cell at least 1, and limit above 0")
        self.cell, self.changed, self.limit, self.mask = cell, changed, limit, mask

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        if samples.ndim != 4:
            raise ConfigError("preserve: scores edited images, not videos")
        difference = (samples.float() - source_images(prompts, samples)).abs().mean(1, keepdim=True)
        cells = F.avg_pool2d(difference, self.cell, ceil_mode=True).flatten(1)
        stays = max(1, cells.shape[1] - round(self.changed * cells.shape[1]))
        kept = cells.sort(dim=1).values[:, :stays].mean(1)
        masked = [row for row, prompt in enumerate(prompts) if prompt.metadata.get(self.mask)]
        if masked:
            weight = 1 - torch.stack([self._light(prompts[row], samples) for row in masked])
            part = (difference[masked, 0] * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-6)
            kept[masked] = part
        distance = kept.double().cpu().numpy()
        return Scores((1 - distance / self.limit).clip(0, 1), components={"distance": distance})  # pyright: ignore[reportCallIssue]

    def _light(self, prompt: Prompt, samples: Tensor) -> Tensor:
        """float32 [H, W] in [0, 1]: where the prompt's mask lets the image change."""
        from PIL import Image

        height, width = samples.shape[-2:]
        path = Path(prompt.image or "").parent / str(prompt.metadata[self.mask])
        picture = open_image(str(path)).convert("L").resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(picture).copy()).to(samples.device).float() / 255
