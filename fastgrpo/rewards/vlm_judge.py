"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, …) as a judge of samples."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import to_pil
from fastgrpo.rewards.neural import options

QUESTION = (
    "The picture was made from this prompt: {prompt}\n"
    "How well does it show what the prompt asks for? Judge objects, counts, colours, positions and style. "
    "Answer with a score from {low} to {high}; {high} means that nothing is missing or wrong."
)


class VlmJudgeReward:
    """The judge's score, scaled to [0, 1]; a sample whose answer does not fit the schema, or does not come, is invalid.

    url: of the API, such as http://127.0.0.1:8000/v1; model: its name there; question: with {prompt}, {low}, {high};
    frames: of a video, spread evenly, are shown; token_env: the environment variable that holds the token, if any.
    """

    @options
    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
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
        self.url, self.model, self.question, self.frames = url.rstrip("/"), model, question, frames
        self.low, self.high, self.parallel, self.attempts = low, high, parallel, attempts
        self.answer: type[BaseModel] = create_model(
            "Answer", __config__=ConfigDict(extra="forbid", strict=True), score=(int, Field(ge=low, le=high))
        )
        headers = {} if token_env is None else {"Authorization": f"Bearer {os.environ[token_env]}"}
        self.client = httpx.Client(timeout=timeout, headers=headers)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        with ThreadPoolExecutor(self.parallel) as pool:
            values = np.array(list(pool.map(self._judge, samples.cpu(), prompts)))
        return Scores(values, np.isfinite(values))

    def _judge(self, sample: Tensor, prompt: Prompt) -> float:
        """The score of one sample [3, H, W] or [3, F, H, W], NaN where there is none."""
        body = self._request(sample, prompt)
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

    def _request(self, sample: Tensor, prompt: Prompt) -> dict[str, Any]:
        frames = sample[None] if sample.ndim == 3 else sample.movedim(1, 0)
        chosen = np.linspace(0, len(frames) - 1, min(self.frames, len(frames))).round().astype(int)
        content: list[dict[str, Any]] = []
        for picture in to_pil(frames[chosen]):
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
