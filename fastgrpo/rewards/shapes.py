"""The shapes verifier as a reward: does the image show what the prompt says?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.base import Scores
from fastgrpo.shapes.verifier import verify
from fastgrpo.shapes.world import ShapesPrompt, parse


class ShapesReward:
    """The verifier's score in [0, 1] (component `strict`: 1 where the image is exactly right).

    A prompt that the shapes world cannot parse makes its sample invalid.
    """

    def __init__(self) -> None:
        self._parsed: dict[str, ShapesPrompt | None] = {}

    def _parse(self, text: str) -> ShapesPrompt | None:
        if text not in self._parsed:
            try:
                self._parsed[text] = parse(text)
            except ValueError:
                self._parsed[text] = None
        return self._parsed[text]

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        parsed = [self._parse(p.text) for p in prompts]
        valid = np.array([p is not None for p in parsed])
        values, strict = np.zeros(len(parsed)), np.zeros(len(parsed))
        if valid.any():
            known = [p for p in parsed if p is not None]
            result = verify(samples.cpu().numpy()[valid], known)
            values[valid], strict[valid] = result.score, result.strict
        return Scores(values, valid, {"strict": strict})
