"""What neural rewards share: weights loaded when they first score, batches on the device, text encoded once."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import ConfigDict, validate_call
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.weights import check_exists

# Checks the types of a reward's options: `load_reward` names the one that is wrong.
options = validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
Dtype = Literal["auto", "bfloat16", "float32"]


class TextCache:
    """Features by text, the most recently used `size` of them: a group's samples share their prompt."""

    def __init__(self, encode: Callable[[list[str]], Tensor], size: int = 4096) -> None:
        self.encode, self.size = encode, size
        self.rows: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, …] of the texts; only those not seen lately are encoded, each once."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            self.rows.update(zip(new, self.encode(new).unbind(0), strict=True))
        for text in texts:
            self.rows.move_to_end(text)
        found = torch.stack([self.rows[text] for text in texts])
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)
        return found

    def clear(self) -> None:
        self.rows.clear()


class NeuralReward(ABC):
    """A reward with weights: `load` gives the module, `judge` the scores of a batch on the device.

    path: of the weights; batch: samples of a forward pass; dtype: auto is bfloat16 on a GPU and float32 on a CPU;
    device: auto is this rank's GPU where there is one; offload: weights wait in host memory between scoring phases.
    """

    def __init__(self, path: str, batch: int, dtype: Dtype, device: str, offload: bool) -> None:
        check_exists(path)
        if batch < 1:
            raise ValueError(f"batch: {batch} is below 1")
        self.path, self.batch, self.offload = path, batch, offload
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(local if device == "auto" else device)
        automatic = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, automatic if dtype == "auto" else dtype)
        self.texts = TextCache(self.encode_texts)
        self._module: nn.Module | None = None
        self._away = False

    @abstractmethod
    def load(self) -> nn.Module:
        """The module with its weights, on the host in float32."""

    @abstractmethod
    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        """`score` and components [b] of a batch that lies on the device."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Features [n, …] of distinct texts, which are cached."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """The module on the device, loaded when it is first asked for."""
        if self._module is None:
            self._module = self.load().to(self.device, self.dtype)
        elif self._away:
            self._module.to(self.device)
            self._away = False
        return self._module

    @torch.no_grad()
    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(samples), self.batch):
            rows = slice(start, start + self.batch)
            parts.append(self.judge(samples[rows].to(self.device), prompts[rows], fps))
        columns = {k: torch.cat([part[k].double() for part in parts]).cpu().numpy() for k in parts[0]}
        values = columns.pop("score")
        return Scores(values, np.isfinite(values), columns)

    def release(self) -> None:
        """The end of a scoring phase: with `offload`, the weights go to host memory."""
        if self.offload and self._module is not None:
            self._module.to("cpu")
            self._away = True
