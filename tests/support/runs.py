"""Runs that are over: their metrics, without what depends on the clock, and their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch

from fastgrpo.training.callbacks import Callback
from fastgrpo.training.state import training_tensors
from fastgrpo.training.trainer import Trainer

TIMES = ("time/", "samples_per_second", "memory/", "ranks/", "gpu/")


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    def flat(tree, prefix):
        for name, value in tree.items():
            inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
            yield from inner

    return {name: tensor.detach().clone() for name, tensor in flat(training_tensors(trainer.optimizer), "")}


Kind = TypeVar("Kind", bound=Callback)


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind:
    """The trainer's callback of a class, which it has."""
    found = kind.of(trainer)
    assert found is not None
    return found


def finished(config) -> Trainer:
    trainer = Trainer.from_config(config)
    trainer.run()
    return trainer
