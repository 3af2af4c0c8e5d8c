"""VideoAlign (arXiv 2501.13918): a Qwen2-VL reads the video and a questionnaire; its states at three reward tokens give
visual quality, motion quality and text alignment.

Frames never leave memory: they are sampled, resized and cut into patches by tensor operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.neural import Dtype, NeuralReward, options
from fastgrpo.rewards.qwen2_vl import (
    AFTER,
    BEFORE,
    VIDEO,
    frame_size,
    load_model,
    load_words,
    picture_tokens,
    read_template,
    states,
    to_patches,
)
from fastgrpo.rewards.weights import check_exists, read_json, read_state, resolve

DIMENSIONS = ("VQ", "MQ", "TA")
REWARD_TOKENS = [f"<|{name}_reward|>" for name in DIMENSIONS]
# Mean and standard deviation of each dimension, as published.
PUBLISHED = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
# Sampling: frames a second (even numbers of frames, at least four), and pixels of a frame.
FPS, FEWEST = 2.0, 4
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 448 * 448


class Backbone(NeuralReward):
    """The model itself, which gives all three dimensions; `VideoAlignReward`s of the same settings share it."""

    shared: ClassVar[dict[tuple, Backbone]] = {}

    def __init__(
        self, path: str, base: str, template: str, fps: float, min_pixels: int, max_pixels: int, batch: int,
        dtype: Dtype, device: str, offload: bool,
    ) -> None:  # fmt: skip
        super().__init__(path, batch, dtype, device, offload)
        check_exists(base)
        self.base, self.fps, self.pixels = base, fps, (min_pixels, max_pixels)
        self.template = read_template(Path(template), ["{text_prompt}", *REWARD_TOKENS])
        self._last: tuple[Tensor, list[str], float | None, Scores] | None = None

    def load(self) -> nn.Module:
        where = resolve(self.path)
        settings = where.parent / "model_config.json" if where.is_file() else where / "model_config.json"
        state = merged(read_state(where), read_json(settings) if settings.exists() else {}, where)
        model, config = load_model(self.base, reward_head, state, where)
        self.tokenizer, self.reward_ids = load_words(self.base, REWARD_TOKENS, model, where)
        self.vision = config.vision_config
        return model

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        module: Any = self.module
        frames = sampled(samples, fps or FPS, self.fps)
        height, width = frame_size(frames.shape[-2], frames.shape[-1], *self.pixels)
        patches, grid = to_patches(frames, height, width, self.vision)
        video = VIDEO * picture_tokens(grid, self.vision)
        texts = [BEFORE + video + AFTER.format(text=self.template.format(text_prompt=p.text)) for p in prompts]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        ids = tokens["input_ids"]
        found = states(module.qwen, ids, tokens["attention_mask"], patches.to(self.dtype), grid, "video")
        scores = {}
        rows = torch.arange(len(ids), device=self.device)
        for place, (name, token) in enumerate(zip(DIMENSIONS, self.reward_ids, strict=True)):
            # A prompt may quote a token. It stands after the questionnaire's VQ and MQ, and before its TA.
            there = (ids == token).int()
            where = there.argmax(dim=1) if name != "TA" else ids.shape[1] - 1 - there.flip(1).argmax(dim=1)
            scores[name] = module.rm_head(found[rows, where])[:, place].float()
        return {"score": torch.zeros_like(scores["VQ"]), **scores}

    def scores_of(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        """All dimensions of these samples; asked again for the very same tensor, as VQ, MQ and TA do, it remembers."""
        texts = [p.text for p in prompts]
        if self._last is not None and self._last[0] is samples and self._last[1:3] == (texts, fps):
            return self._last[3]
        scores = self.score(samples, prompts, fps)
        self._last = samples, texts, fps, scores
        return scores

    def release(self) -> None:
        self._last = None
        super().release()


def reward_head(width: int) -> nn.Module:
    return nn.Linear(width, len(DIMENSIONS), bias=False)


class VideoAlignReward:
    """One dimension, normalised as published (raw: as the model gives it); the others are components.

    path: the published checkpoint, converted to safetensors, beside its model_config.json; template: its questionnaire,
    written by convert-reward; base: where Qwen2-VL-2B's config and tokenizer are; fps, min_pixels, max_pixels: how
    frames are sampled and resized. Rewards of the same settings share one model and one pass.
    """

    dimension: ClassVar[str]

    @options
    def __init__(
        self,
        path: str,
        template: str,
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        raw: bool = False,
        fps: float = FPS,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        batch: int = 4,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        key = (path, base, template, fps, min_pixels, max_pixels, batch, dtype, device, offload)
        if key not in Backbone.shared:
            Backbone.shared[key] = Backbone(*key)
        self.backbone, self.raw = Backbone.shared[key], raw

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        if samples.ndim != 5:
            raise ConfigError("videoalign judges videos, and these samples are images")
        every = self.backbone.scores_of(samples, prompts, fps)
        values = {name: self._scaled(name, every.components[name]) for name in DIMENSIONS}
        mine = values.pop(self.dimension)
        return Scores(mine, every.valid, values)

    def _scaled(self, name: str, values: Any) -> Any:
        mean, deviation = PUBLISHED[name]
        return values if self.raw else (values - mean) / deviation

    def release(self) -> None:
        self.backbone.release()


class VisualQualityReward(VideoAlignReward):
    dimension = "VQ"


class MotionQualityReward(VideoAlignReward):
    dimension = "MQ"


class TextAlignmentReward(VideoAlignReward):
    dimension = "TA"


def sampled(videos: Tensor, fps: float, wanted: float) -> Tensor:
    """Frames of [B, 3, F, H, W] at `wanted` a second, evenly: an even number, at least FEWEST if there are as many."""
    total = videos.shape[2]
    count = min(max(total / fps * wanted, FEWEST), total)
    count = max(2, int(count) // 2 * 2) if total > 1 else 1
    index = torch.linspace(0, total - 1, count).round().long()
    return videos.index_select(2, index.to(videos.device))


def merged(state: Mapping[str, Tensor], settings: Mapping[str, Any], where: object) -> dict[str, Tensor]:
    """A checkpoint's tensors with its LoRA, where there is one, added to the weights it was trained on.

    settings: its model_config.json, which has the LoRA's scale. Raises ConfigError where that is needed and missing.
    """
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    found = {}
    for key, tensor in plain.items():
        if ".lora_" in key:
            continue
        name = (
            key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".original_module.", ".")
        )
        if ".original_module." in key:
            continue
        stem = key.removesuffix(".base_layer.weight")
        if stem != key and (down := _lora(plain, stem, "A")) is not None:
            up = _lora(plain, stem, "B")
            lora = settings.get("peft_lora_config", {})
            if up is None or "lora_alpha" not in lora or "lora_r" not in lora:
                raise ConfigError(f"path: {where} holds a LoRA; put its model_config.json beside it")
            delta = up.float() @ down.float() * (lora["lora_alpha"] / lora["lora_r"])
            tensor = (tensor.float() + delta).to(tensor.dtype)
        found[name] = tensor
    return found


def _lora(state: Mapping[str, Tensor], stem: str, side: str) -> Tensor | None:
    return state.get(f"{stem}.lora_{side}.default.weight", state.get(f"{stem}.lora_{side}.weight"))
