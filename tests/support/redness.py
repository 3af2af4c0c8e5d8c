"""A reward that remembers how it was asked, and runs that are compared by it."""

from __future__ import annotations

import threading

import numpy as np
import torch

from fastgrpo.rewards import Scores
from fastgrpo.training.trainer import Trainer
from support.runs import weights


def finished(config) -> Trainer:
    trainer = Trainer.from_config(config)
    trainer.run()
    return trainer


def assert_same(a: Trainer, b: Trainer) -> None:
    for (name, ours), theirs in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(ours, theirs), name


class Redness:
    """How red; remembers the thread and the sizes of its calls."""

    threads: list
    sizes: list

    def score(self, samples, prompts, fps):
        type(self).threads.append(threading.current_thread().name)
        type(self).sizes.append(len(samples))
        values = samples[:, 0].mean(dim=(1, 2)).double().numpy()
        return Scores(values, np.ones(len(values), bool), {"twice": 2 * values})


REDNESS = [{"name": "support.redness:Redness"}]
