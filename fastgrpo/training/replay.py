"""The latest rollouts, trained again: with their own ratios, or against the weights of their own old policy.

A rollout keeps what its update needed, so a ratio of GRPO stays exact however old it is. Of a forward process the old
policy's weights as they were are kept beside it, and put back while it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.distributed.shards import locals_of
from fastgrpo.errors import UserError
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.rollouts import Rollouts
from fastgrpo.rollout.trajectory import tensors
from fastgrpo.training.optimizer import OptimizerState


@dataclass(frozen=True)
class KeptRollout:
    """A rollout to be trained again.

    Attributes:
        batch: Its samples.
        advantages: Of all global samples.
        chosen: The samples that it holds, bool [N].
        old: This rank's shards of the old policy's weights as they were; None where no old policy is compared with.
    """

    batch: Batch
    advantages: Advantages
    chosen: np.ndarray
    old: list[Tensor] | None


class Replay:
    """The rollouts before this one that an iteration trains too, newest first: `earlier`, at most size − 1."""

    def __init__(self, size: int, optimizer: OptimizerState) -> None:
        self.size, self.optimizer = size, optimizer
        self.earlier: list[KeptRollout] = []

    def keep(self, batch: Batch, advantages: Advantages, chosen: np.ndarray) -> KeptRollout | None:
        """What `push` takes of a rollout that is about to be trained; None where nothing is kept."""
        if self.size == 1:
            return None
        old = self.optimizer.old
        weights = None if old is None else [shard.clone() for shard in locals_of(old.parameters)]
        return KeptRollout(batch, advantages, chosen, weights)

    def push(self, kept: KeptRollout | None) -> None:
        """Takes in the rollout that was trained last, and forgets the one that is too old."""
        if kept is not None:
            self.earlier = [kept, *self.earlier][: self.size - 1]

    @contextmanager
    def old_of(self, kept: KeptRollout) -> Iterator[None]:
        """Within it the old policy is the one of a kept rollout."""
        if kept.old is None:
            yield
            return
        now = self.optimizer.replace_old(kept.old)
        try:
            yield
        finally:
            self.optimizer.replace_old(now)

    def state(self, ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint keeps: plain data, and this rank's tensors by number."""
        rows = [
            {
                "iteration": kept.batch.iteration,
                "drawn": kept.batch.drawn.tolist(),
                "chosen": kept.chosen.tolist(),
                "terms": kept.advantages.terms.tolist(),
                "valid": kept.advantages.valid.tolist(),
                "zero_spread": kept.advantages.zero_spread.tolist(),
            }
            for kept in self.earlier
        ]
        return {"ranks": ranks, "rollouts": rows}, self._tensors()

    def restore(self, state: Mapping[str, Any], rollouts: Rollouts, ranks: int) -> dict[str, Any]:
        """Takes in the data of `state`. Returns the tensors, to be filled from the checkpoint.

        Raises:
            UserError: Where other ranks rolled the samples out.
        """
        if state["rollouts"] and state["ranks"] != ranks:
            raise UserError(
                f"run.resume: the checkpoint holds rollouts of {state['ranks']} ranks (update.replay), and there are "
                f"{ranks}; go on with as many"
            )
        self.earlier = []
        for row in state["rollouts"]:
            chosen, terms = np.array(row["chosen"]), np.array(row["terms"], dtype=np.float64)
            batch = rollouts.restored(row["iteration"], np.array(row["drawn"]), chosen)
            valid, flat = np.array(row["valid"]), np.array(row["zero_spread"])
            old = self.optimizer.old
            weights = None if old is None else [torch.empty_like(shard) for shard in locals_of(old.parameters)]
            advantages = Advantages(terms.sum(axis=1), terms, valid, flat)
            self.earlier.append(KeptRollout(batch, advantages, chosen, weights))
        return self._tensors()

    def _tensors(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for number, kept in enumerate(self.earlier):
            named[str(number)] = {"trajectory": tensors(kept.batch.trajectory)}
            if kept.old is not None:
                named[str(number)]["old"] = {
                    name: shard
                    for name, shard in zip(self.optimizer.names, kept.old, strict=True)
                    if shard.numel()
                }  # fmt: skip
        return named
