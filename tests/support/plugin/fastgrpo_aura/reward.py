"""A reward: the standard deviation of an image's pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgrpo.data import Prompt
from fastgrpo.rewards import Scores


class Contrast:
    """The standard deviation of an image's pixels times `scale`; an image that is flat is not scored."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        spread = samples.flatten(1).std(dim=1).double().cpu().numpy()
        return Scores(spread * self.scale, valid=spread > 0)
