"""Runs of one and of two ranks, and what they hold in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from fastgrpo.planning.meter import Meter
from fastgrpo.training.trainer import Trainer
from support.tiny import tiny_config

PLANNED = {
    "rollout": {"steps": 4, "group_size": 8, "decode_batch": 2}, "model": {"activation_checkpointing": "all"},
    "update": {"optimizer_steps": 2, "grad_sync": "per_micro_batch", "gather": "per_block", "ema_decay": 0.9},
}  # fmt: skip


def measured(path: Path, folder: Path, settings: dict) -> None:
    """What an iteration costs in fact: the peak of tensor memory, operations and collectives counted.

    The peak is the profiler's on one rank; on two it does not see what gloo's threads free, and the meter's stands in,
    which tests/test_plan.py compares with the profiler's.
    """
    folder.mkdir(exist_ok=True)
    config = tiny_config(path, folder / "run", **settings)
    trainer = Trainer.from_config(config)
    trainer.step()
    trainer.flush()
    trainer.family.encode([trainer.rollouts.prompts[i] for i in trainer.rollouts.sampler.at(1)])
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    plain = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in plain if t.device.type == "cpu")}
    meter = Meter()
    meter.claim((t for t in plain if t.device.type == "cpu"), "parameters")
    del tensors, plain
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, meter:
        trainer.step()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    more = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    peak = sum(storages.values()) + int(more.max()) if trainer.world.ranks == 1 else meter.peak
    cost = {"flops": meter.cost.flops, "peak": peak}
    cost |= {f"{key.kind} {key.group}": [n, meter.cost.bytes[key]] for key, n in meter.cost.count.items()}
    if trainer.world.main:
        (folder / "cost.json").write_text(json.dumps(cost))


def runs_of(path: Path, folder: Path, variants: dict[str, dict]) -> None:
    """What an iteration of two ranks costs, and a run of each variant."""
    # First, while this process holds nothing else.
    measured(path, folder / "measured 2", PLANNED)
    for name, settings in variants.items():
        finished(path, folder / name, settings)


def finished(path: Path, folder: Path, settings: dict) -> None:
    """A short run with evaluations, and its whole weights."""
    settings = {**settings, "rollout": {"group_size": 4, **settings.get("rollout", {})}}
    trainer = Trainer.from_config(
        tiny_config(path, folder, train={"iterations": 2}, eval={"every": 1, "images": 5}, **settings)
    )
    trainer.run()
    named = trainer.family.denoiser.named_parameters()
    full = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().contiguous() for n, p in named}
    if trainer.world.main:
        save_file(full, folder / "weights.safetensors")
