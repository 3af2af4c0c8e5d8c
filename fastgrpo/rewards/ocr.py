"""Does the picture show the text that the prompt asks for? Read by rapidocr, whose models are in its package."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import require
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import middle_frame, resize
from fastgrpo.rewards.neural import options

# Rows of pixels that the recogniser sees.
READ_HEIGHT = 48
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|「([^」]+)」")


class OcrReward:
    """How much of the wanted text a picture shows, in 0..1. Case, spaces and punctuation do not count. The text is the
    prompt's metadata `text`, or what stands in double quotes; a prompt without any makes its sample invalid. Component
    `strict`: 1 where the score is 1. Of a video, the middle frame is read.

    min_side: smaller images are enlarged to it, so that the text detector sees letters. detect: whether lines of text
    are looked for first; without, the whole picture is read as one line, `batch` pictures at once. match: contains: 1
    where the text read contains the wanted one, else 1 − edit distance / length of the wanted text, at least 0; equal:
    1 − edit distance / the longer of both texts' lengths.
    """

    @options
    def __init__(
        self,
        min_side: int = 64,
        detect: bool = True,
        batch: int = 32,
        match: Literal["contains", "equal"] = "contains",
    ) -> None:
        for package in ("rapidocr", "onnxruntime"):
            require(package, "rewards.ocr")
        if batch < 1:
            raise ValueError(f"batch: {batch} is below 1")
        self.min_side, self.detect, self.batch = min_side, detect, batch
        self.similarity = SIMILARITIES[match]
        self._readers: dict[int, Any] = {}

    def describe(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """What is read in each sample."""
        return [f"“{text}”" for text in self.read(self._pixels(middle_frame(samples)))]

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        wanted = [normalise(target_text(p)) for p in prompts]
        rows = [i for i, text in enumerate(wanted) if text]
        values = np.zeros(len(prompts))
        for i, read in zip(rows, self.read(self._pixels(middle_frame(samples)[rows])), strict=True):
            values[i] = self.similarity(wanted[i], normalise(read))
        return Scores(values, np.array([bool(text) for text in wanted]), {"strict": (values == 1).astype(float)})

    def _pixels(self, images: Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3] of images [N, 3, H, W] in 0..1, in the order of channels that the reader knows."""
        if self.detect and len(images) and (small := min(images.shape[-2:])) < self.min_side:
            height, width = (round(side * self.min_side / small) for side in images.shape[-2:])
            images = resize(images, height, width)
        return (images.flip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def read(self, pixels: np.ndarray) -> list[str]:
        """The texts of pictures [N, H, W, 3] uint8 (blue, green, red); lines of one are joined by spaces."""
        if self.detect:
            return [" ".join(self._reader(0)(picture).txts or ()) for picture in pixels]
        height, width = pixels.shape[1:3]
        # As wide as the picture is: the recogniser's own width would be mostly padding.
        reader = self._reader(-(-READ_HEIGHT * width // height // 8) * 8)
        return list(reader.recognize_txt(list(pixels)).txts) if len(pixels) else []

    def _reader(self, width: int) -> Any:
        """rapidocr's pipeline; of its recogniser alone, at a width, where it is not 0."""
        if width not in self._readers:
            from rapidocr import RapidOCR

            params: dict[str, Any] = {"Global.log_level": "critical"}
            if width:
                alone = {"Global.use_det": False, "Global.use_cls": False, "Rec.rec_batch_num": self.batch}
                params |= alone | {"Rec.rec_img_shape": [3, READ_HEIGHT, width]}
            self._readers[width] = RapidOCR(params=params)
        return self._readers[width]


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


def equality(wanted: str, read: str) -> float:
    """1 − edit distance / the longer of both lengths: 1 only where the texts are equal."""
    return 1 - edit_distance(wanted, read) / max(len(wanted), len(read))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


SIMILARITIES = {"contains": similarity, "equal": equality}
