"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, …) as a judge of samples and edits."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import httpx
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import source_images, to_pil
from fastgrpo.rewards.neural import options

QUESTION = (
    "The picture was made from this prompt: {prompt}\n"
    "How well does it show what the prompt asks for? Judge objects, counts, colours, positions and style. "
    "Answer with a score from {low} to {high}; {high} means that nothing is missing or wrong."
)

EDITING_QUESTION = (
    "The second picture was made from the first one by this instruction: {prompt}\n"
    "How well was the instruction followed, and how well was everything kept that it does not speak of? Judge both: "
    "a change that is missing or wrong, and anything else that differs. "
    "Answer with a score from {low} to {high}; {high} means that the change is right and nothing else has changed."
)


class VlmJudgeReward:
    """The judge's score, scaled to [0, 1]; a sample whose answer does not fit the schema, or does not come, is invalid.

    url: of the API, such as http://127.0.0.1:8000/v1; model: its name there; question: with {prompt}, {low}, {high},
    None: `own_question`; frames: of a video, spread evenly, are shown; token_env: the environment variable that holds
    the token, if any.
    """

    own_question: ClassVar[str] = QUESTION

    @options
    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        low: int = 1,
        high: int = 10,
        frames: int = 4,
        parallel: int = 16,
        timeout: float = 60.0,
        attempts: int = 3,
        token_env: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url: {url} is not an address such as http://127.0.0.1:8000/v1")
        if token_env is not None and token_env not in os.environ:
            raise ConfigError(f"token_env: the environment has no {token_env}")
        if high <= low or min(frames, parallel, attempts) < 1:
            raise ConfigError("high: must be above low; frames, parallel and attempts at least 1")
        self.url, self.model, self.frames = url.rstrip("/"), model, frames
        self.question = question or self.own_question
        self.low, self.high, self.parallel, self.attempts = low, high, parallel, attempts
        self.answer: type[BaseModel] = create_model(
            "Answer", __config__=ConfigDict(extra="forbid", strict=True), score=(int, Field(ge=low, le=high))
        )
        headers = {} if token_env is None else {"Authorization": f"Bearer {os.environ[token_env]}"}
        self.client = httpx.Client(timeout=timeout, headers=headers)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        with ThreadPoolExecutor(self.parallel) as pool:
            values = np.array(list(pool.map(self._judge, self.pictures(samples, prompts), prompts)))
        return Scores(values, np.isfinite(values))

    def pictures(self, samples: Tensor, prompts: Sequence[Prompt]) -> Iterable[Tensor]:
        """What the judge is shown of each sample, in order: [pictures, 3, H, W]."""
        for sample in samples.cpu():
            frames = sample[None] if sample.ndim == 3 else sample.movedim(1, 0)
            yield frames[np.linspace(0, len(frames) - 1, min(self.frames, len(frames))).round().astype(int)]

    def _judge(self, pictures: Tensor, prompt: Prompt) -> float:
        """The score of one sample by its pictures [n, 3, H, W], NaN where there is none."""
        body = self._request(pictures, prompt)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(0.2 * 2**attempt)
            try:
                reply = self.client.post(f"{self.url}/chat/completions", json=body)
                reply.raise_for_status()
                text = reply.json()["choices"][0]["message"]["content"]
                score: int = self.answer.model_validate_json(text).score  # pyright: ignore[reportAttributeAccessIssue]
            except (httpx.HTTPError, ValidationError, ValueError, LookupError, TypeError):
                continue
            return (score - self.low) / (self.high - self.low)
        return float("nan")

    def _request(self, pictures: Tensor, prompt: Prompt) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for picture in to_pil(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        question = self.question.format(prompt=prompt.text, low=self.low, high=self.high)
        schema = {"name": "answer", "strict": True, "schema": self.answer.model_json_schema()}
        return {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "response_format": {"type": "json_schema", "json_schema": schema},
        }


class EditJudgeReward(VlmJudgeReward):
    """`VlmJudgeReward` of edits: the judge sees the source image of the prompt, then the edited image [B, 3, H, W]."""

    own_question = EDITING_QUESTION

    def pictures(self, samples: Tensor, prompts: Sequence[Prompt]) -> Iterable[Tensor]:
        if samples.ndim != 4:
            raise ConfigError("edit_judge: judges edited images, not videos")
        return torch.stack([source_images(prompts, samples), samples], dim=1).cpu()
