"""The moving world's verifier as rewards: the whole verdict, its motion alone, its aesthetics alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.neural import options
from fastgrpo.shapes.moving_verifier import verify
from fastgrpo.shapes.moving_world import MovingPrompt, parse


class MovingShapesReward:
    """The verifier's score in [0, 1] of videos [B, 3, F, S, S]; components `strict` (1 where the video is exactly
    right), `objects`, `motion`, `aesthetics` and `shape`.

    outlines: A video is right only if the outline of every object asked for keeps its corners, fill and size in every
    frame; the partial credit of objects is multiplied by `shape`. Without it a few rough frames are forgiven.

    A prompt that the moving world cannot parse, or a video that holds a NaN, makes its sample invalid.
    """

    part: ClassVar[str] = "score"
    others: ClassVar[tuple[str, ...]] = ("strict", "objects", "motion", "aesthetics", "shape")

    @options
    def __init__(self, outlines: bool = False) -> None:
        self.outlines = outlines

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        parsed = [_parse(p.text) for p in prompts]
        valid = np.array([p is not None for p in parsed])
        columns = {name: np.zeros(len(parsed)) for name in (self.part, *self.others)}
        if valid.any():
            result = verify(samples.cpu().numpy()[valid], [p for p in parsed if p is not None], self.outlines)
            for name, column in columns.items():
                column[valid] = getattr(result, name)
        values = columns.pop(self.part)
        return Scores(values, valid & np.isfinite(values), columns)


class MovingMotionReward(MovingShapesReward):
    """Motion quality: direction, speed and smoothness of the objects asked for. Component `aesthetics`."""

    part = "motion"
    others = ("strict", "aesthetics")


class MovingAestheticsReward(MovingShapesReward):
    """Clean and stable frames, whatever the prompt. Component `motion`."""

    part = "aesthetics"
    others = ("strict", "motion")


@functools.cache
def _parse(text: str) -> MovingPrompt | None:
    try:
        return parse(text)
    except ValueError:
        return None
