"""HPSv3 (arXiv 2508.03789): a Qwen2-VL reads the image and a questionnaire; its state at one reward token gives the
mean of a normal distribution over people's preference, and how wide it is.

The image never leaves memory: it is resized and cut into patches by tensor operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.images import middle_frame
from fastgrpo.rewards.neural import Dtype, NeuralReward, options
from fastgrpo.rewards.qwen2_vl import (
    AFTER,
    BEFORE,
    IMAGE,
    frame_size,
    load_model,
    load_words,
    picture_tokens,
    read_template,
    states,
    to_patches,
)
from fastgrpo.rewards.weights import check_exists, read_state, resolve

REWARD_TOKEN = "<|Reward|>"
# Every image is resized to about so many pixels.
PIXELS = 256 * 28 * 28


class HPSv3Reward(NeuralReward):
    """The mean, and as component `spread` the second output, which says how sure the model is.

    path: the published weights, or their file; template: its questionnaire, written by convert-reward; base: where
    Qwen2-VL-7B's config and tokenizer are; pixels: to which every image is resized. Of a video, the middle frame.
    """

    @options
    def __init__(
        self,
        template: str,
        path: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        pixels: int = PIXELS,
        batch: int = 4,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, batch, dtype, device, offload)
        check_exists(base)
        self.base, self.pixels = base, pixels
        self.template = read_template(Path(template), ["{text_prompt}", REWARD_TOKEN])

    def load(self) -> nn.Module:
        where = resolve(self.path)
        model, config = load_model(self.base, reward_head, read_state(where), where)
        self.tokenizer, (self.reward_id,) = load_words(self.base, [REWARD_TOKEN], model, where)
        self.vision = config.vision_config
        # As published, in float32 whatever the rest is in.
        self.head = model.rm_head.to(self.device)
        return model.qwen

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        qwen, images = self.module, middle_frame(samples)
        height, width = frame_size(images.shape[-2], images.shape[-1], self.pixels, self.pixels)
        patches, grid = to_patches(images[:, :, None], height, width, self.vision)
        image = IMAGE * picture_tokens(grid, self.vision)
        texts = [BEFORE + image + AFTER.format(text=self.template.format(text_prompt=p.text)) for p in prompts]
        tokens: Any = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        ids = tokens["input_ids"]
        found = states(qwen, ids, tokens["attention_mask"], patches.to(self.dtype), grid, "image")
        # A prompt may quote the token: the questionnaire's comes last.
        last = ids.shape[1] - 1 - (ids == self.reward_id).int().flip(1).argmax(dim=1)
        mean, spread = self.head(found[torch.arange(len(ids), device=self.device), last].float()).unbind(1)
        return {"score": mean, "spread": spread}


def reward_head(width: int) -> nn.Module:
    """A state to (mean, spread)."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
