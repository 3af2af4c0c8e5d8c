"""A served judge of edits, such as EditScore (arXiv 2509.23909): the instruction, what was kept, the picture.

Its score is VIEScore's (arXiv 2312.14867): the geometric mean of the lower score of each of two questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import source_images
from fastgrpo.rewards.neural import options
from fastgrpo.rewards.vlm_judge import ServedModel

FORM = (
    'Answer as JSON: {{"reasoning": "…", "score": [a, b]}}, each from 0 to {high}; {high} means that nothing is wrong.'
)
CONSISTENCY = (
    "The second picture was made from the first one by this instruction: {prompt}\n"
    "Give two scores: how well the instruction was followed, and how well everything else was kept as it was. " + FORM
)
QUALITY = (
    "The picture was edited. Give two scores, whatever was asked for: how natural it looks as a whole, and how free it "
    "is of artifacts such as seams, blurred or distorted parts. " + FORM
)
# The answer's object, whatever stands before and after it.
OBJECT = re.compile(r"\{.*\}", re.DOTALL)


class EditRewardReward:
    """√(consistency · quality) in [0, 1], each the lower of the two scores of a question, and a component.

    The first question shows the source image of the prompt and the edited image, the second the edited image alone.
    consistency, quality: the questions, with {prompt} and {high}, None: ours; high: the end of the scale, which
    EditScore has at 25; the others as `vlm_judge.ServedModel` has them.
    """

    @options
    def __init__(
        self,
        url: str,
        model: str,
        consistency: str | None = None,
        quality: str | None = None,
        high: int = 10,
        parallel: int = 16,
        timeout: float = 120.0,
        attempts: int = 3,
        token_env: str | None = None,
    ) -> None:
        if high < 1:
            raise ConfigError(f"high: {high} is not above 0, where the scale begins")
        self.served = ServedModel(url, model, parallel, timeout, attempts, token_env)
        self.questions, self.high = (consistency or CONSISTENCY, quality or QUALITY), high

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        if samples.ndim != 4:
            raise ConfigError("edit_reward: judges edited images, not videos")
        pairs = torch.stack([source_images(prompts, samples), samples], dim=1).cpu()
        consistency, quality = np.array(self.served.map(self._judge, pairs, prompts)).reshape(-1, 2).T
        values = np.sqrt(consistency * quality)
        return Scores(values, np.isfinite(values), {"consistency": consistency, "quality": quality})

    def _judge(self, pair: Tensor, prompt: Prompt) -> tuple[float, float]:
        """The lower score of each question, in [0, 1], NaN where there is none; pair: source and edit, [2, 3, H, W]."""
        answers = [
            self.served.ask(shown, question.format(prompt=prompt.text, high=self.high), self._read)
            for shown, question in zip((pair, pair[1:]), self.questions, strict=True)
        ]
        consistency, quality = (float("nan") if answer is None else answer for answer in answers)
        return consistency, quality

    def _read(self, text: str) -> float:
        return read_lower(text, self.high)


def read_lower(text: str, high: float) -> float:
    """The lower of an answer's two scores, scaled to [0, 1].

    Raises:
        ValueError: For an answer that is not JSON with two scores on the scale.
    """
    match = OBJECT.search(text)
    found = json.loads(match[0]).get("score") if match else None
    scores = found if isinstance(found, list) else []
    numbers = all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores)
    if not (numbers and len(scores) == 2 and all(0 <= score <= high for score in scores)):
        raise ValueError(f"no two scores from 0 to {high:g} in {text[:80]!r}")
    return min(scores) / high
