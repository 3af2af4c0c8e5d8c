"""Scoring: every reward on decoded samples, checked; every rank's scores in the order of the global samples.

A score that is not there (an exception, a NaN, an answer of the wrong length) masks its sample and is counted; no
number is ever made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.world import World
from fastgrpo.rewards import Reward, Scores
from fastgrpo.rewards.base import ask, describe, release
from fastgrpo.rewards.failures import FailureLog


@dataclass(frozen=True)
class AllScores:
    """Scores of all N global samples, the same on every rank.

    values, valid, asked: float64 and bool [R, N], a row a reward; components: float64 [N] by `<reward>.<component>`,
    NaN on samples whose reward failed or was not asked; stop: the largest wish to stop of any rank.
    """

    values: np.ndarray
    valid: np.ndarray
    asked: np.ndarray
    components: dict[str, np.ndarray]
    stop: int

    def failure_rate(self, weights: np.ndarray) -> float:
        """The share of samples for which a reward that has a weight gave no valid score."""
        return float(1 - self.valid[weights != 0].all(axis=0).mean())


def score_samples(
    rewards: Mapping[str, Reward],
    images: Tensor,
    prompts: Sequence[Prompt],
    fps: float | None,
    failures: FailureLog,
) -> dict[str, Scores]:
    """Scores of every reward for these samples. One that raises, or answers nonsense, has failed for all of them.

    images: [n, 3, H, W] or [n, 3, F, H, W] in [0, 1], of `fps` frames a second. A sample with a pixel that is
    not finite has failed every reward.
    """
    scores = {}
    # A sum of pixels in [0, 1] is finite where all of them are, and takes one pass.
    finite = images.flatten(1).sum(dim=1).isfinite().numpy()
    if not finite.all():
        failures.failed(f"{int((~finite).sum())} of {len(finite)} samples are not finite and count as failed")
        images = images.nan_to_num(0.0, 0.0, 0.0)
    for name, reward in rewards.items():
        try:
            scores[name] = ask(reward, images, prompts, fps)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.failed(f"reward '{name}' failed for {len(prompts)} samples", name, error)
            scores[name] = Scores.failed(len(prompts))
        if not finite.all():
            scores[name] = replace(scores[name], valid=scores[name].valid & finite)
    return scores


def describe_samples(
    rewards: Mapping[str, Reward], failures: FailureLog, images: Tensor, prompts: Sequence[Prompt]
) -> dict[str, list[str]]:
    """What the rewards that say something see in each sample, by reward; one that raises is left out, and said."""
    found = {}
    for name, reward in rewards.items():
        try:
            texts = describe(reward, images, prompts)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.failed(f"reward '{name}' could not describe {len(prompts)} samples", name, error)
        else:
            if any(texts):
                found[name] = texts
    return found


def release_rewards(rewards: Mapping[str, Reward], failures: FailureLog) -> None:
    """The end of a scoring phase; a reward whose `release` raises is said, and its scores stay."""
    for name, reward in rewards.items():
        try:
            release([reward])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.failed(f"reward '{name}' failed in release()", name, error)


def joined(parts: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """The scores of consecutive chunks of samples as those of all; a component that a part lacks is NaN there."""
    return {name: Scores.concatenate([part[name] for part in parts]) for name in parts[0]}


def gather_scores(
    scores: Mapping[str, Scores], owned: Callable[[int], np.ndarray], world: World, failures: FailureLog, stop: int = 0
) -> AllScores:
    """Returns the scores of every process, the same on all of them.

    Args:
        scores: This process's scores, by reward.
        owned: Gives the global samples that a process scored, in the order of its scores.
        world: The processes.
        failures: Of this process; the first one tells those of all.
        stop: This process's wish to stop; the largest of all is in the result.
    """
    mine = sorted((name, component) for name in scores for component in scores[name].components)
    names = _agreed(mine, world, failures)
    count = len(next(iter(scores.values())).values)
    missing = np.full(count, np.nan)
    rows = [getattr(s, column) for column in ("values", "valid", "asked") for s in scores.values()]
    rows += [scores[name].components.get(component, missing) for name, component in names]
    vector = np.concatenate([np.stack(rows).astype(np.float64).reshape(-1), [float(stop)]])
    everyone = world.gather_all(vector)
    samples = [owned(process) for process in range(world.ranks)]
    table = np.empty((len(rows), len(np.unique(np.concatenate(samples)))))
    for vector, places in zip(everyone, samples, strict=True):
        table[:, places] = vector[:-1].reshape(len(rows), -1)
    R = len(scores)
    components = {f"{name}.{component}": table[3 * R + i] for i, (name, component) in enumerate(names)}
    return AllScores(table[:R], table[R : 2 * R] > 0, table[2 * R : 3 * R] > 0, components, int(everyone[:, -1].max()))


def _agreed(names: list[tuple[str, str]], world: World, failures: FailureLog) -> list[tuple[str, str]]:
    """The components that any rank has: one whose reward failed does not know of them. Why it failed goes with them."""
    if world.ranks == 1:
        return names
    text = json.dumps([names, failures.untold()]).encode()
    length = int(world.gather_all(np.array([float(len(text))])).max())
    padded = np.frombuffer(text.ljust(length), dtype=np.uint8).astype(np.float64)
    said = [json.loads(row.astype(np.uint8).tobytes()) for row in world.gather_all(padded)]
    failures.tell_others([lines for _, lines in said])
    return sorted({tuple(pair) for pairs, _ in said for pair in pairs})
