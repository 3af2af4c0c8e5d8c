"""What rewards over a Qwen2-VL share: its chat, its patches, its states, and the names of published checkpoints.

The published reward models override the forward pass of transformers 4.45, which numbers text and picture tokens alike
one after the other where it is given no positions: they were trained with those, not with Qwen2-VL's own of three axes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.errors import ConfigError
from fastgrpo.rewards.images import OPENAI_MEAN, OPENAI_STD, normalize
from fastgrpo.rewards.weights import load_strict, load_tokenizer, read_json, resolve

# Of the chat that the models were trained in.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


class RewardModel(nn.Module):
    """Qwen2-VL without its language head, and a reward head."""

    def __init__(self, config: Any, head: nn.Module) -> None:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

        super().__init__()
        self.qwen = Qwen2VLModel(config)
        self.rm_head = head


def load_model(base: str, head: Any, state: Mapping[str, Tensor], where: Path) -> tuple[RewardModel, Any]:
    """The model with a checkpoint's weights, and its config.

    Args:
        base: Directory or hub id of the Qwen2-VL that was trained, for its config.
        head: Gives the reward head for a width.
        state: The checkpoint's tensors, under the names of any version of transformers.
        where: The checkpoint, for error messages.

    Raises:
        ConfigError: Where tensors are missing, left over or of another shape.
    """
    from transformers import Qwen2VLConfig

    config: Any = Qwen2VLConfig(**read_json(resolve(base, weights=False) / "config.json"))
    state, words = renamed(state), "qwen.language_model.embed_tokens.weight"
    if words not in state:
        raise ConfigError(f"path: {where} does not fit the model: {words.removeprefix('qwen.')} is missing")
    config.text_config.vocab_size = len(state[words])
    model = RewardModel(config, head(config.text_config.hidden_size))
    return load_strict(model, state, where, (r"^lm_head\.",)), config


def load_words(base: str, tokens: list[str], model: RewardModel, where: Path) -> tuple[Any, list[int]]:
    """The tokenizer with the reward `tokens` added, and their ids. Raises ConfigError."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    ids = tokenizer.convert_tokens_to_ids(tokens)
    words: Any = model.qwen.get_input_embeddings()
    if max(ids) >= len(words.weight):
        raise ConfigError(f"base: the tokenizer of {base} has more words than the model at {where}")
    return tokenizer, ids


def states(qwen: Any, ids: Tensor, mask: Tensor, patches: Tensor, grid: tuple[int, int, int], kind: str) -> Tensor:
    """The last hidden states [B, L, D] of tokens [B, L] with one picture a row.

    patches: [B · t · h · w, …]; grid: (t, h, w) of each; kind: "image" or "video".
    """
    config = qwen.config
    token = config.image_token_id if kind == "image" else config.video_token_id
    given = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    grids = torch.tensor([grid] * len(ids), device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    return qwen(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        mm_token_type_ids={"image": 1, "video": 2}[kind] * (ids == token).int(),
        use_cache=False,
        **dict(zip(given, (patches, grids), strict=True)),
    ).last_hidden_state


def to_patches(frames: Tensor, height: int, width: int, vision: Any) -> tuple[Tensor, tuple[int, int, int]]:
    """Qwen2-VL's patches [B · t · h · w, …] of frames [B, 3, F, H, W], and their grid (t, h, w)."""
    batch, count = len(frames), frames.shape[2]
    flat = frames.transpose(1, 2).flatten(0, 1)
    levels = F.interpolate(flat.float() * 255, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
    pixels = normalize(levels / 255, OPENAI_MEAN, OPENAI_STD).unflatten(0, (batch, count))
    if short := -count % vision.temporal_patch_size:
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, short, -1, -1, -1)], dim=1)
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    grid = pixels.shape[1] // t, height // p, width // p
    cut = pixels.reshape(batch, grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
    return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * t * p * p), grid


def picture_tokens(grid: tuple[int, int, int], vision: Any) -> int:
    """How many tokens of the text stand for a picture."""
    return math.prod(grid) // vision.spatial_merge_size**2


def frame_size(height: int, width: int, fewest: int, most: int, factor: int = 28) -> tuple[int, int]:
    """Multiples of `factor` near a frame's size, with `fewest` to `most` pixels and about its aspect."""
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < fewest:
        grow = math.sqrt(fewest / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of `RewardModel`: from transformers' old names (visual.…, model.layers.…) or new ones
    (model.visual.…, model.language_model.…)."""
    found = {}
    for key, tensor in state.items():
        name = re.sub(r"^model\.(?=(visual|language_model)\.)", "", key)
        name = re.sub(r"^model\.(?=(layers|embed_tokens|norm)\b)", "language_model.", name)
        inside = name.startswith(("visual.", "language_model."))
        found[f"qwen.{name}" if inside else name] = tensor
    return found


def read_template(path: Path, once: list[str]) -> str:
    """The text of a file that holds each string of `once` exactly once. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"template: {path} cannot be read: {error.strerror}") from None
    for part in once:
        if text.count(part) != 1:
            raise ConfigError(f'template: {path} should hold "{part}" once')
    return text
