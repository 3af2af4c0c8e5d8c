"""What a reward is: decoded samples in memory and their prompts in; a score and a validity per sample out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt


@dataclass(frozen=True)
class Scores:
    """What a reward says of B samples.

    values: float64 [B]; valid: bool [B], False where no score could be given (never a made-up number): a value that
    is not finite is not valid. components: further named float64 [B] for logs and evaluation, NaN where there is no
    score. asked: bool [B], False where the reward does not apply to the prompt: such a sample has not failed, and its
    value is 0. Raises ValueError where the shapes differ.
    """

    values: np.ndarray
    valid: np.ndarray
    components: dict[str, np.ndarray] = field(default_factory=dict)
    asked: np.ndarray | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        asked = np.ones(values.shape, dtype=bool) if self.asked is None else np.asarray(self.asked, dtype=bool)
        valid = np.asarray(self.valid, dtype=bool)
        components = {name: np.array(column, dtype=np.float64) for name, column in self.components.items()}
        for name, column in {"valid": valid, "asked": asked, **components}.items():
            if values.ndim != 1 or column.shape != values.shape:
                raise ValueError(f"Scores: values {values.shape} and {name} {column.shape} should be one [B] each")
        valid = valid & np.isfinite(values) | ~asked
        for column in components.values():
            column[~(valid & asked)] = np.nan
        object.__setattr__(self, "values", np.where(valid & asked, values, 0.0))
        object.__setattr__(self, "valid", valid)
        object.__setattr__(self, "components", components)
        object.__setattr__(self, "asked", asked)

    @property
    def counted(self) -> np.ndarray:
        """bool [B]: samples that were asked for and have a score."""
        assert self.asked is not None
        return self.valid & self.asked

    @staticmethod
    def failed(count: int) -> Scores:
        """Of `count` samples none of which could be scored."""
        return Scores(np.zeros(count), np.zeros(count, dtype=bool))

    @staticmethod
    def not_asked(count: int) -> Scores:
        """Of `count` samples that a reward was not asked about."""
        return Scores(np.zeros(count), np.ones(count, dtype=bool), {}, np.zeros(count, dtype=bool))

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """The scores of consecutive chunks of samples; a component that one chunk lacks is NaN there."""
        names = dict.fromkeys(name for part in parts for name in part.components)
        components = {
            name: np.concatenate([p.components.get(name, np.full(len(p.values), np.nan)) for p in parts])
            for name in names
        }
        columns = [np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "valid", "asked")]
        return Scores(columns[0], columns[1], components, columns[2])

    def scatter(self, chosen: np.ndarray) -> Scores:
        """The scores of len(chosen) samples, of which these are the `chosen` (bool) and the others were not asked."""

        def spread(column: np.ndarray, fill: Any) -> np.ndarray:
            full = np.full(len(chosen), fill, dtype=column.dtype)
            full[chosen] = column
            return full

        assert self.asked is not None
        components = {name: spread(column, np.nan) for name, column in self.components.items()}
        return Scores(spread(self.values, 0.0), spread(self.valid, True), components, spread(self.asked, False))


class Reward(Protocol):
    """A class with a `score` method. It may have `release()`, called at the end of a scoring phase."""

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        """samples: [B, 3, H, W] images, or [B, 3, F, H, W] videos of `fps` frames a second; float32 in [0, 1], on any
        device. prompts: B, with their metadata. An exception means that none of them could be scored."""
        ...


def release(rewards: Iterable[Reward]) -> None:
    """The end of a scoring phase: rewards with `offload` give their memory on the device back."""
    for reward in rewards:
        if hasattr(reward, "release"):
            reward.release()  # pyright: ignore[reportAttributeAccessIssue]


def matches(prompt: Prompt, when: Mapping[str, Sequence[Any]]) -> bool:
    """Does the prompt's metadata have one of the values under each key?"""
    return all(prompt.metadata.get(key) in values for key, values in when.items())


def take(samples: Tensor, prompts: Sequence[Prompt], chosen: np.ndarray) -> tuple[Tensor, list[Prompt]]:
    """The chosen (bool [B]) samples and their prompts."""
    import torch

    index = torch.from_numpy(np.flatnonzero(chosen)).to(samples.device)
    return samples.index_select(0, index), [p for p, c in zip(prompts, chosen, strict=True) if c]
