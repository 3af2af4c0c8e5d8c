"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, …) as a judge of samples and edits."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import httpx
import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.images import source_images, to_pil
from fastgrpo.rewards.neural import options

Answer = TypeVar("Answer")

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


class ServedModel:
    """A vision-language model behind an OpenAI-compatible endpoint, which is asked about pictures.

    url: of the API, such as http://127.0.0.1:8000/v1; model: its name there; parallel: questions asked at once;
    attempts: how often one is asked; token_env: the environment variable that holds the token, if any. Raises
    ConfigError for settings that cannot be.
    """

    def __init__(
        self, url: str, model: str, parallel: int, timeout: float, attempts: int, token_env: str | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url: {url} is not an address such as http://127.0.0.1:8000/v1")
        if token_env is not None and token_env not in os.environ:
            raise ConfigError(f"token_env: the environment has no {token_env}")
        if min(parallel, attempts) < 1:
            raise ConfigError("parallel: must be at least 1, and so must attempts")
        self.url, self.model, self.parallel, self.attempts = url.rstrip("/"), model, parallel, attempts
        headers = {} if token_env is None else {"Authorization": f"Bearer {os.environ[token_env]}"}
        self.client = httpx.Client(timeout=timeout, headers=headers)

    def map(self, ask: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
        """`ask` of every sample, several at once."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(ask, *columns))

    def ask(
        self, pictures: Tensor, question: str, read: Callable[[str], Answer], schema: Mapping[str, Any] | None = None
    ) -> Answer | None:
        """What `read` makes of the answer; None where no attempt gives one that it can read.

        pictures: [n, 3, H, W]; read: raises ValueError for an answer that it cannot read; schema: a JSON schema that
        the server holds the answer to.
        """
        content: list[dict[str, Any]] = [*map(_picture, to_pil(pictures)), {"type": "text", "text": question}]
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        if schema is not None:
            named = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(0.2 * 2**attempt)
            try:
                reply = self.client.post(f"{self.url}/chat/completions", json=body)
                reply.raise_for_status()
                return read(reply.json()["choices"][0]["message"]["content"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError):
                continue
        return None


def _picture(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


class VlmJudgeReward:
    """The judge's score, scaled to [0, 1]; a sample whose answer does not fit the schema, or does not come, is invalid.

    question: with {prompt}, {low}, {high}, None: `own_question`; frames: of a video, spread evenly, are shown; the
    others as `ServedModel` has them.
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
        if high <= low or frames < 1:
            raise ConfigError("high: must be above low; frames at least 1")
        self.served = ServedModel(url, model, parallel, timeout, attempts, token_env)
        self.question, self.frames = question or self.own_question, frames
        self.low, self.high = low, high
        self.answer: type[BaseModel] = create_model(
            "Answer", __config__=ConfigDict(extra="forbid", strict=True), score=(int, Field(ge=low, le=high))
        )

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        values = np.array(self.served.map(self._judge, self.pictures(samples, prompts), prompts))
        return Scores(values, np.isfinite(values))

    def pictures(self, samples: Tensor, prompts: Sequence[Prompt]) -> Iterable[Tensor]:
        """What the judge is shown of each sample, in order: [pictures, 3, H, W]."""
        return frames_of(samples, self.frames)

    def _judge(self, pictures: Tensor, prompt: Prompt) -> float:
        """The score of one sample by its pictures [n, 3, H, W], NaN where there is none."""
        question = self.question.format(prompt=prompt.text, low=self.low, high=self.high)
        score = self.served.ask(pictures, question, self._read, self.answer.model_json_schema())
        return float("nan") if score is None else (score - self.low) / (self.high - self.low)

    def _read(self, text: str) -> int:
        return self.answer.model_validate_json(text).score  # pyright: ignore[reportAttributeAccessIssue]


def frames_of(samples: Tensor, frames: int) -> Iterable[Tensor]:
    """Of each image, itself, of each video so many frames, spread evenly: [pictures, 3, H, W], on the host."""
    for sample in samples.cpu():
        shown = sample[None] if sample.ndim == 3 else sample.movedim(1, 0)
        yield shown[np.linspace(0, len(shown) - 1, min(frames, len(shown))).round().astype(int)]


class EditJudgeReward(VlmJudgeReward):
    """`VlmJudgeReward` of edits: the judge sees the source image of the prompt, then the edited image [B, 3, H, W]."""

    own_question = EDITING_QUESTION

    def pictures(self, samples: Tensor, prompts: Sequence[Prompt]) -> Iterable[Tensor]:
        if samples.ndim != 4:
            raise ConfigError("edit_judge: judges edited images, not videos")
        return torch.stack([source_images(prompts, samples), samples], dim=1).cpu()
