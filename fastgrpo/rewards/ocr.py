"""Does the picture show the text that the prompt asks for? Read by rapidocr, whose models are in its package."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import require
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import middle_frame, resize
from fastgrpo.rewards.neural import options

QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|「([^」]+)」")


class OcrReward:
    """1 − edit distance / length of the wanted text, at least 0; 1 where the text read contains it. Case, spaces and
    punctuation do not count. The text is the prompt's metadata `text`, or what stands in double quotes; a prompt
    without any makes its sample invalid. Component `exact`. Of a video, the middle frame is read.

    min_side: smaller images are enlarged to it, so that the text detector sees letters.
    """

    @options
    def __init__(self, min_side: int = 64) -> None:
        for package in ("rapidocr", "onnxruntime"):
            require(package, "rewards.ocr")
        self.min_side = min_side
        self._reader: Any = None

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        wanted = [normalise(target_text(p)) for p in prompts]
        images = middle_frame(samples)
        if (small := min(images.shape[-2:])) < self.min_side:
            height, width = (round(side * self.min_side / small) for side in images.shape[-2:])
            images = resize(images, height, width)
        # The reader was trained on OpenCV's order of channels.
        pixels = (images.flip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        values = np.zeros(len(prompts))
        for place, text in enumerate(wanted):
            if text:
                values[place] = similarity(text, normalise(self.read(pixels[place])))
        return Scores(values, np.array([bool(text) for text in wanted]), {"exact": (values == 1).astype(float)})

    def read(self, pixels: np.ndarray) -> str:
        """The text of a picture [H, W, 3] uint8 (blue, green, red), lines joined by spaces."""
        if self._reader is None:
            from rapidocr import RapidOCR

            self._reader = RapidOCR(params={"Global.log_level": "critical"})
        found = self._reader(pixels)
        return " ".join(found.txts or ())


def target_text(prompt: Prompt) -> str:
    """The text that a prompt asks for, or nothing."""
    if "text" in prompt.metadata:
        return str(prompt.metadata["text"])
    return " ".join(next(filter(None, groups)) for groups in QUOTED.findall(prompt.text))


def normalise(text: str) -> str:
    """Letters and digits alone, of one case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def similarity(wanted: str, read: str) -> float:
    """1 where `read` contains `wanted`; else 1 − edit distance / len(wanted), at least 0."""
    return 1.0 if wanted in read else max(0.0, 1 - edit_distance(wanted, read) / len(wanted))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
