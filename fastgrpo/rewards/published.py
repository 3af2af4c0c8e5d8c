"""What is published for the rewards that are built in: where their weights are, how large, and what a score costs.

Sizes are of the files as their pages list them, to two figures; `fastgrpo assets --download` asks the hub itself.
Parameters and FLOPs are those of the architectures, which a test builds.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from fastgrpo.config import RewardSpec
from fastgrpo.rewards import REGISTERED, REWARDS

# Of a hub id that a reward names: bytes of what is downloaded.
HUB_BYTES = {
    "yuvalkirstain/PickScore_v1": 3.9e9,
    "openai/clip-vit-large-patch14": 1.7e9,
    "facebook/mask2former-swin-small-coco-instance": 0.28e9,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 4e6,
    "google-bert/bert-base-uncased": 1e6,
    "Qwen/Qwen2-VL-2B-Instruct": 12e6,
    "Qwen/Qwen2-VL-7B-Instruct": 12e6,
}

# How the file that `path` names is made, where what is published is a pickle archive: (repository, file, bytes).
CONVERTED = {
    "hps": ("xswu/HPSv2", "HPS_v2.1_compressed.pt", 2.0e9),
    "image_reward": ("zai-org/ImageReward", "ImageReward.pt", 1.8e9),
}

# The arguments of a reward that name files: True where they are its weights, False for a tokenizer or a config beside
# them, which are small.
PLACES = {"path": True, "clip": True, "processor": False, "tokenizer": False, "base": False, "template": False}


@dataclass(frozen=True)
class Cost:
    """parameters: of a reward's model. flops: of scoring one image; of a video its middle frame, or for VideoAlign the
    frames it samples of four seconds."""

    parameters: float
    flops: float


_VIT_L, _VIT_H = Cost(0.43e9, 0.16e12), Cost(0.99e9, 0.33e12)
COSTS = {
    "clip": _VIT_L,
    "aesthetic": _VIT_L,
    "hps": _VIT_H,
    "hpsv3": Cost(7.75e9, 12e12),
    "pickscore": _VIT_H,
    "image_reward": Cost(0.45e9, 0.16e12),
    "geneval": Cost(0.5e9, 0.3e12),
    **dict.fromkeys(("videoalign_vq", "videoalign_mq", "videoalign_ta"), Cost(2.2e9, 9e12)),
}
# Rewards that compute nothing worth counting on this GPU, or compute elsewhere.
SERVED = {"remote", "vlm_judge", "unified_reward", "edit_reward", "edit_judge"}
_MOVING = {name for name in REGISTERED if name.startswith("moving")}
FREE = {*SERVED, *_MOVING, "binary", "composite", "ocr", "tesseract", "shapes", "editing", "preserve"}


def inner(spec: RewardSpec) -> list[RewardSpec]:
    """A reward and those that it wraps (`options.of`), as entries of a config; what is no entry is left to its own
    error."""
    of = spec.options.get("of")
    parts = []
    for entry in of if isinstance(of, list) else [of]:
        with suppress(ValidationError):
            parts.append(RewardSpec.model_validate(entry))
    found = [one for part in parts for one in inner(part)]
    return [spec, *(one.model_copy(update={"label": f"{spec.key}.{one.key}"}) for one in found)]


def places(spec: RewardSpec) -> dict[str, tuple[str, bool]]:
    """By argument, where a built-in reward's files are (a path or hub id), and whether they are its weights."""
    if spec.name not in REGISTERED:
        return {}
    signature = inspect.signature(REWARDS.load(spec.name, "rewards").__init__).parameters
    given: dict[str, Any] = {"path": spec.path, **spec.options}
    found = {}
    for name, weights in PLACES.items():
        if name in signature:
            default = signature[name].default
            value = given.get(name) or (default if isinstance(default, str) else None)
            if isinstance(value, str):
                found[name] = (value, weights)
    return found


def cost(spec: RewardSpec) -> Cost | None:
    """What a reward costs, with those that it wraps; None where it is not known (a reward of one's own)."""
    total = Cost(0.0, 0.0)
    for one in inner(spec):
        if one.name in FREE or (one.path or "").startswith("shapes:"):
            continue
        if one.name not in COSTS:
            return None
        more = COSTS[one.name]
        total = replace(total, parameters=total.parameters + more.parameters, flops=total.flops + more.flops)
    return total
