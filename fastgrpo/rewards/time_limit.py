"""A time limit for rewards that judge in this process: one that hangs has failed for its samples."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards.base import Reward, Scores, ask


class LimitedReward:
    """A reward whose `score` raises TimeoutError after `seconds`.

    Python cannot end a thread: one that hangs stays, and until it is done every later call fails at once.
    """

    def __init__(self, reward: Reward, name: str, seconds: float) -> None:
        self.reward, self.name, self.seconds = reward, name, seconds
        self._late: threading.Thread | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        if self._late is not None and self._late.is_alive():
            raise TimeoutError(f"still busy with samples that took longer than scoring.timeout, {self.seconds:g} s")
        found: list[Any] = []
        # The stream, the device and the gradient mode belong to a thread.
        stream = torch.cuda.current_stream() if samples.is_cuda or torch.cuda.is_available() else None
        gradients = torch.is_grad_enabled()

        def work() -> None:
            try:
                with torch.cuda.stream(stream), torch.set_grad_enabled(gradients):
                    found.append((ask(self.reward, samples, prompts, fps), None))
            except BaseException as error:
                found.append((None, error))

        thread = threading.Thread(target=work, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not found:
            self._late = thread
            raise TimeoutError(f"no answer within scoring.timeout, {self.seconds:g} s")
        scores, error = found[0]
        if error is not None:
            raise error
        return scores
