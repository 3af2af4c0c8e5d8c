"""UnifiedReward (arXiv 2503.05236), served: its scores of a picture for alignment, coherence and style."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.neural import options
from fastgrpo.rewards.vlm_judge import ServedModel, frames_of

# In the form of answer that the model was trained to give; the words before it are ours.
QUESTION = (
    "The picture was made from this caption: {prompt}\n"
    "Rate it from 1, worst, to 5, best, with decimals where you need them: how well it shows what the caption says, "
    "how well its parts fit together without flaws, and how good it looks. Answer in three lines:\n"
    "Alignment Score (1-5): …\nCoherence Score (1-5): …\nStyle Score (1-5): …"
)
SCALES = ("alignment", "coherence", "style")
LOWEST, HIGHEST = 1.0, 5.0
# Such as "**Alignment Score (1-5):** 4.25"; models that reason give one "Final Score: 4".
SCORE = re.compile(r"\b(Alignment|Coherence|Style|Final) Score(?: \(1-5\))?\W*?:\W*([0-9]+(?:\.[0-9]+)?)")


class UnifiedRewardReward:
    """The mean of a served UnifiedReward's scores, scaled to [0, 1], with each as a component.

    question: with {prompt}, None: ours; frames: of a video, spread evenly, are shown; the others as
    `vlm_judge.ServedModel` has them.
    """

    @options
    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        frames: int = 4,
        parallel: int = 16,
        timeout: float = 120.0,
        attempts: int = 3,
        token_env: str | None = None,
    ) -> None:
        self.served = ServedModel(url, model, parallel, timeout, attempts, token_env)
        self.question, self.frames = question or QUESTION, frames

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        found = self.served.map(self._judge, frames_of(samples, self.frames), prompts)
        values = np.array([np.nan if scores is None else np.mean(list(scores.values())) for scores in found])
        named = {name: np.array([(s or {}).get(name, np.nan) for s in found]) for name in SCALES}
        return Scores(values, np.isfinite(values), named)

    def _judge(self, pictures: Tensor, prompt: Prompt) -> dict[str, float] | None:
        return self.served.ask(pictures, self.question.format(prompt=prompt.text), read_scores)


def read_scores(text: str) -> dict[str, float]:
    """The scores of an answer, each scaled to [0, 1]: of all three scales, or `final` alone.

    Raises:
        ValueError: For an answer that lacks one, has one twice with different values, or one that is off the scale.
    """
    found: dict[str, float] = {}
    for name, value in SCORE.findall(text):
        score = float(value)
        if not LOWEST <= score <= HIGHEST or found.setdefault(name.lower(), score) != score:
            raise ValueError(f"{name} Score: {value}")
    names = SCALES if set(SCALES) <= found.keys() else ("final",)
    if any(name not in found for name in names):
        raise ValueError(f"no scores in {text[:80]!r}")
    return {name: (found[name] - LOWEST) / (HIGHEST - LOWEST) for name in names}
