"""What a reward is: decoded samples in memory and their prompts in; a score and a validity per sample out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgrpo.data.prompts import Prompt


@dataclass(frozen=True)
class Scores:
    """What a reward says of B samples.

    values: float64 [B]; valid: bool [B], False where no score could be given (never a made-up number): a value that
    is not finite is not valid; None: every finite one is. components: further named float64 [B] for logs and
    evaluation, NaN where there is no score. asked: bool [B], False where the reward does not apply to the prompt: such
    a sample has not failed, and its value is 0.

    Each column may be given as an array, a list, or a tensor of any dtype and device, with a gradient or without; [B]
    or [B, 1]. It becomes a numpy array. Raises ValueError where the shapes differ.
    """

    values: np.ndarray
    valid: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    components: dict[str, np.ndarray] = field(default_factory=dict)
    asked: np.ndarray | None = None

    def __post_init__(self) -> None:
        values = as_column(self.values)
        asked, valid = (
            np.ones(values.shape, dtype=bool) if flags is None else np.nan_to_num(as_column(flags)) != 0
            for flags in (self.asked, self.valid)
        )
        components = {str(name): as_column(column).copy() for name, column in (self.components or {}).items()}
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
        """Returns the scores of samples none of which could be scored.

        Args:
            count: The number of samples.
        """
        return Scores(np.zeros(count), np.zeros(count, dtype=bool))

    @staticmethod
    def not_asked(count: int) -> Scores:
        """Returns the scores of samples that a reward was not asked about.

        Args:
            count: The number of samples.
        """
        return Scores(np.zeros(count), np.ones(count, dtype=bool), {}, np.zeros(count, dtype=bool))

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """Returns the scores of consecutive chunks of samples as one.

        Args:
            parts: The scores of each chunk; a component that one of them lacks is NaN there.
        """
        names = dict.fromkeys(name for part in parts for name in part.components)
        components = {
            name: np.concatenate([p.components.get(name, np.full(len(p.values), np.nan)) for p in parts])
            for name in names
        }
        columns = [np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "valid", "asked")]
        return Scores(columns[0], columns[1], components, columns[2])

    def scatter(self, chosen: np.ndarray) -> Scores:
        """Returns the scores of all samples, where these are the scores of some and the others were not asked for.

        Args:
            chosen: bool [len(all samples)], True for the samples that these are the scores of, in their order.
        """

        def spread(column: np.ndarray, fill: Any) -> np.ndarray:
            full = np.full(len(chosen), fill, dtype=column.dtype)
            full[chosen] = column
            return full

        assert self.asked is not None
        components = {name: spread(column, np.nan) for name, column in self.components.items()}
        return Scores(spread(self.values, 0.0), spread(self.valid, True), components, spread(self.asked, False))


def as_column(column: Any) -> np.ndarray:
    """float64 [B] of an array (masked ones are NaN), a list (None is NaN) or a tensor, whatever its dtype, device and
    gradient.

    A column [B, 1] is taken as [B]; other shapes stay as they are. Raises TypeError and ValueError for what is not
    real numbers.
    """
    if isinstance(column, Tensor) and not column.is_complex():
        numbers = column.detach().to("cpu", torch.float64).numpy()
    elif isinstance(column, list | tuple):
        numbers = np.array([np.nan if x is None else _number(x) for x in column], dtype=np.float64)
    else:
        array = np.ma.asarray(column)
        if array.dtype.kind in "cmM":
            raise TypeError("complex numbers and dates are no scores")
        numbers = np.ma.filled(array.astype(np.float64), np.nan)
    return numbers[:, 0] if numbers.ndim == 2 and numbers.shape[1] == 1 else numbers


def _number(x: Any) -> Any:
    return as_column(x) if isinstance(x, Tensor | list | tuple) else x


class Reward(Protocol):
    """A class with a `score` method.

    It may have `release()`, called at the end of a scoring phase, and `describe(samples, prompts)`, which says in a few
    words what it sees in each sample: an evaluation asks it about the pictures that it shows.
    """

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        """samples: [B, 3, H, W] images, or [B, 3, F, H, W] videos of `fps` frames a second; float32 in [0, 1], on any
        device. prompts: B, with their metadata. An exception means that none of them could be scored.

        Returns Scores. People's own rewards may also return one number for each sample (see `ask`)."""
        ...


class FunctionReward:
    """A function (samples, prompts, fps, **options) that scores, as a reward."""

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        self.function, self.options = function, dict(options)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Any:
        return self.function(samples, prompts, fps, **self.options)


@torch.no_grad()
def ask(reward: Reward, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
    """The scores that a reward gives samples [B, …]; every call of a reward's `score` is this one.

    One that is not ours gets copies of the samples and prompts: what it writes into them, no other reward sees. The
    working directory is afterwards what it was.
    Raises what the reward raises, and ValueError where it does not give Scores, or one number, for each sample.
    """
    if isinstance(reward, FunctionReward) or not type(reward).__module__.startswith("fastgrpo."):
        with chdir("."):
            result = reward.score(samples.clone(), copy.deepcopy(list(prompts)), fps)
        return as_scores(result, len(prompts))
    return as_scores(reward.score(samples, prompts, fps), len(prompts))


def as_scores(result: Any, count: int) -> Scores:
    """What a reward returned for `count` samples, as Scores. Raises ValueError, in one line, for anything else."""
    scores = result
    if isinstance(result, Tensor | np.ndarray | list | tuple):
        try:
            scores = Scores(result)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            scores = None
    if not isinstance(scores, Scores):
        raise ValueError(
            f"score should return Scores, or one number for each of the {count} samples (a tensor, an array or a "
            f"list); it returned {_described(result)}"
        )
    if len(scores.values) != count:
        raise ValueError(f"there are {len(scores.values)} scores, and {count} samples")
    return scores


def _described(value: Any) -> str:
    """What an object is, in a few words."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Tensor | np.ndarray):
        return f"{kind} {list(value.shape)} of {value.dtype}"
    if isinstance(value, list | tuple):
        inside = ", ".join(dict.fromkeys(type(x).__name__ for x in value))
        return f"a {kind} of {len(value)}: {inside:.80}" if value else f"an empty {kind}"
    return f"{kind}: {' '.join(repr(value).split()):.60}"


def describe(reward: Reward, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
    """What a reward sees in each sample, by its own `describe`; an empty text where it says nothing."""
    if not hasattr(reward, "describe"):
        return [""] * len(prompts)
    return [str(text) for text in reward.describe(samples, prompts)]  # pyright: ignore[reportAttributeAccessIssue]


def release(rewards: Iterable[Reward]) -> None:
    """The end of a scoring phase: rewards with `offload` give their memory on the device back."""
    for reward in rewards:
        if hasattr(reward, "release"):
            with chdir("."):
                reward.release()  # pyright: ignore[reportAttributeAccessIssue]


def matches(prompt: Prompt, when: Mapping[str, Sequence[Any]]) -> bool:
    """Does the prompt's metadata have one of the values under each key?"""
    return all(prompt.metadata.get(key) in values for key, values in when.items())


def take(samples: Tensor, prompts: Sequence[Prompt], chosen: np.ndarray) -> tuple[Tensor, list[Prompt]]:
    """The chosen (bool [B]) samples and their prompts."""
    index = torch.from_numpy(np.flatnonzero(chosen)).to(samples.device)
    return samples.index_select(0, index), [p for p, c in zip(prompts, chosen, strict=True) if c]
