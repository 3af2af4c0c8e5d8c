"""GenEval (arXiv 2310.11513): are the objects there, as many, of these colours, in these places? Mask2Former finds
them, CLIP names their colours.

What a prompt asks for is its metadata (`include`, `exclude`), as GenEval's files and `set:geneval` have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.data.sets import COLORS
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.clip import OPENAI_L, ClipReward
from fastgrpo.rewards.images import middle_frame, normalize, resize
from fastgrpo.rewards.neural import Dtype, NeuralReward, options
from fastgrpo.rewards.weights import load_pretrained, read_json, resolve

# Objects count above this; when they are to be counted, above the stricter one. At most so many of a class.
THRESHOLD, COUNTING, MOST = 0.3, 0.9, 16
# Objects are beside each other when their centres are further apart than this share of their sizes.
APART = 0.1
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BEHIND = 0.6


@dataclass(frozen=True)
class Found:
    """An object: its box (x0, y0, x1, y1) in pixels, how sure it is, and its mask [H, W] (bool)."""

    box: tuple[float, float, float, float]
    sure: float
    mask: Tensor | None = None


class GenevalReward(NeuralReward):
    """1 where everything the prompt asks for is there, else 0 (component `strict` too); component `soft`: the share of
    its conditions that hold. soft: that share as the value. A prompt without `include` makes its sample invalid.

    path: a Mask2Former for COCO's instances, in transformers' layout; clip: names the colours.
    """

    @options
    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = OPENAI_L,
        soft: bool = False,
        batch: int = 8,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, batch, dtype, device, offload)
        self.clip, self.soft = ClipReward(path=clip, dtype=dtype, device=device, offload=offload), soft

    def load(self) -> nn.Module:
        from transformers import Mask2FormerForUniversalSegmentation

        where = resolve(self.path)
        processor = read_json(where / "preprocessor_config.json")
        self.mean, self.std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        self.size, self.divisor = processor["size"], processor.get("size_divisor") or 32
        model = load_pretrained(Mask2FormerForUniversalSegmentation, where)
        self.names = {name.casefold(): int(i) for i, name in model.config.id2label.items()}
        return model

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        asked = np.array([bool(p.metadata.get("include")) for p in prompts])
        return Scores(*_columns(super().score(samples, prompts, fps), asked))

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        images = middle_frame(samples)
        shares = []
        for image, found, prompt in zip(images, self.detect(images), prompts, strict=True):
            holds = conditions(prompt.metadata, found, lambda name, objects, i=image: self.colors(i, name, objects))
            shares.append(sum(holds) / len(holds) if holds else 0.0)
        soft = torch.tensor(shares, dtype=torch.float64)
        strict = (soft == 1).double()
        return {"score": soft if self.soft else strict, "strict": strict, "soft": soft}

    def detect(self, images: Tensor) -> list[dict[str, list[Found]]]:
        """The objects of images [B, 3, H, W] by class, the surest first."""
        model: Any = self.module
        height, width = images.shape[-2:]
        pixels = normalize(resize(images, *self._resized(height, width), mode="bilinear"), self.mean, self.std)
        down, right = (-side % self.divisor for side in pixels.shape[-2:])
        seen = pixels.shape[-2:]
        output = model(pixel_values=F.pad(pixels, (0, right, 0, down)).to(self.dtype))
        scores = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        masks = F.interpolate(output.masks_queries_logits.float(), (seen[0] + down, seen[1] + right), mode="bilinear")
        masks = F.interpolate(masks[..., : seen[0], : seen[1]], (height, width), mode="bilinear")
        names = {index: name for name, index in self.names.items()}
        return [_objects(s, m, names) for s, m in zip(scores, masks, strict=True)]

    def colors(self, image: Tensor, name: str, objects: Sequence[Found]) -> list[str]:
        """The likeliest colour of each object: CLIP on its crop, with what is not the object greyed out."""
        if not objects:
            return []
        features = torch.cat([self.clip.encode_images(_crop(image, o)[None].to(self.clip.device)) for o in objects])
        texts = [t.format(color=color, name=name) for color in COLORS for t in COLOR_PROMPTS]
        classes = self.clip.texts(texts).unflatten(0, (len(COLORS), -1)).mean(dim=1)
        return [COLORS[i] for i in (features @ F.normalize(classes, dim=-1).T).argmax(dim=1).tolist()]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        scale = self.size["shortest_edge"] / min(height, width)
        scale = min(scale, self.size.get("longest_edge", 10**9) / max(height, width))
        return round(height * scale), round(width * scale)

    def release(self) -> None:
        self.clip.release()
        super().release()


def conditions(metadata: Mapping[str, Any], found: Mapping[str, list[Found]], colors: Any) -> list[bool]:
    """Which of a prompt's conditions hold, GenEval's rules. colors(class, objects): their colours.

    Each entry of `include` asks for `count` objects of a class, perhaps of a color, perhaps at a position of an earlier
    entry's; each of `exclude` forbids `count`.
    """
    least = COUNTING if metadata.get("tag") == "counting" else THRESHOLD
    sure = {name: [o for o in objects if o.sure > least][:MOST] for name, objects in found.items()}
    holds, groups = [], []
    for entry in metadata.get("include") or ():
        name, count = entry["class"], entry.get("count", 1)
        objects = sure.get(name, [])[:count]
        right = len(objects) >= count
        if right and "color" in entry:
            right = sum(color == entry["color"] for color in colors(name, objects)) >= count
        if right and "position" in entry:
            relation, of = entry["position"]
            right = bool(groups[of]) and all(relation in relations(o, t) for o in objects for t in groups[of])
        groups.append(objects if right else [])
        holds.append(right)
    for entry in metadata.get("exclude") or ():
        holds.append(len(sure.get(entry["class"], [])) < entry["count"])
    return holds


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is, seen from `other`: left of, right of, above, below; none where they are at the same place."""
    centres, sizes = [], []
    for x0, y0, x1, y1 in (one.box, other.box):
        centres.append(np.array([x0 + x1, y0 + y1]) / 2)
        sizes.append(np.array([x1 - x0, y1 - y0]))
    offset = centres[0] - centres[1]
    revised = np.maximum(np.abs(offset) - APART * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if not np.any(revised):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    named = (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5))
    return {name for name, holds in named if holds}


def _objects(scores: Tensor, masks: Tensor, names: Mapping[int, str]) -> dict[str, list[Found]]:
    """Of one image: class scores [Q, C] and mask logits [Q, H, W] as objects by class."""
    best, chosen = scores.flatten().topk(min(100, scores.numel()))
    found: dict[str, list[Found]] = {}
    for score, index in zip(best.tolist(), chosen.tolist(), strict=True):
        query, kind = divmod(index, scores.shape[1])
        mask = masks[query] > 0
        if score <= THRESHOLD or not mask.any():
            continue
        sure = score * float(masks[query].sigmoid()[mask].mean())
        rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        found.setdefault(names[kind], []).append(Found(box, sure, mask))
    return {name: sorted(objects, key=lambda o: -o.sure) for name, objects in found.items()}


def _crop(image: Tensor, found: Found) -> Tensor:
    """The object's box, with what is outside its mask grey."""
    x0, y0, x1, y1 = (int(edge) for edge in found.box)
    if found.mask is None:
        raise ConfigError("geneval: an object without a mask has no colour")
    grey = torch.full_like(image, BEHIND)
    return torch.where(found.mask.to(image.device), image, grey)[:, y0:y1, x0:x1]


def _columns(scores: Scores, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    return scores.values, scores.valid & asked, scores.components
