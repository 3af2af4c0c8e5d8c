"""Does the picture show the text that the prompt asks for? Read by tesseract: a judge to hold out beside `ocr`."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import MissingError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import middle_frame
from fastgrpo.rewards.neural import options
from fastgrpo.rewards.ocr import equality, normalise, target_text

# Tesseract's models expect capitals of about this many rows.
READ_HEIGHT = 128


class TesseractReward:
    """1 − edit distance / the longer of the wanted text and the one that tesseract reads, as one word of dark letters
    on a light ground; component `strict`: 1 where they are equal. Case, spaces and punctuation do not count; a prompt
    without a text makes its sample invalid. Of a video, the middle frame is read. Needs the program of that name:
    Debian's tesseract-ocr.

    light: whether letters are light on a dark ground, and the picture is inverted first.
    """

    @options
    def __init__(self, light: bool = False) -> None:
        if shutil.which("tesseract") is None:
            raise MissingError(
                "rewards.tesseract: the program tesseract is not installed: sudo apt-get install tesseract-ocr"
            )
        self.light = light

    def describe(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """What is read in each sample."""
        return [f"“{self.read(picture).strip()}”" for picture in self._pixels(samples)]

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        wanted = [normalise(target_text(p)) for p in prompts]
        pixels = self._pixels(samples)
        values = np.zeros(len(prompts))
        for i, text in enumerate(wanted):
            if text:
                values[i] = equality(text, normalise(self.read(pixels[i])))
        return Scores(values, np.array([bool(text) for text in wanted]), {"strict": (values == 1).astype(float)})

    def _pixels(self, samples: Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3], dark letters on a light ground."""
        pixels = (middle_frame(samples) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return 255 - pixels if self.light else pixels

    def read(self, pixels: np.ndarray) -> str:
        """The text of a picture [H, W, 3] uint8. Raises RuntimeError with tesseract's own words where it fails."""
        picture, file = Image.fromarray(pixels).convert("L"), io.BytesIO()
        size = (round(picture.width * READ_HEIGHT / picture.height), READ_HEIGHT)
        picture.resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
        command = ["tesseract", "stdin", "stdout", "--psm", "8"]
        done = subprocess.run(command, input=file.getvalue(), capture_output=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"tesseract: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode(errors="replace")
