"""Weights that each rank loads for itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastgrpo.distributed.shards import local
from fastgrpo.distributed.world import start_world
from fastgrpo.models import load_family
from fastgrpo.planning.meter import Meter
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.weights import prepare_weights
from support.tiny import tiny_config

EIGHT = {"update": {"optimizer": {"lr": 1e-4, "kind": "adamw_8bit"}}, "parallel": {"load": "sharded"}}


def loaded(path: Path, load: str) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's shards, and the most bytes of tensors there were while they were loaded."""
    config = tiny_config(path, rollout={"group_size": 4}, parallel={"load": load}, objective={"kl_weight": 0.1})
    world = start_world(config)
    with Meter() as meter:
        family = load_family(config.model, world.device, load == "sharded")
        frozen = prepare_weights(family, config, world).frozen
    assert frozen is not None
    named = [
        *family.policy.state_dict().items(),
        *((f"frozen {n}", t) for n, t in frozen["transformer"].state_dict().items()),
    ]
    assert all(isinstance(t, DTensor) for _, t in named)
    assert all(p.requires_grad for p in family.policy.parameters())
    others = sum(
        p.numel() * p.element_size()
        for name, part in family.pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name != "transformer"
        for p in part.parameters()
    )
    return {name: local(t).clone() for name, t in named}, meter.peak - others


def ranks(path: Path, folder: Path) -> None:
    whole, whole_peak = loaded(path, "whole")
    shards, peak = loaded(path, "sharded")
    same = whole.keys() == shards.keys() and all(torch.equal(whole[n], shards[n]) for n in whole)
    for iterations, resume in ((1, False), (3, True)):
        run = {"dir": str(folder / "resumed"), "seed": 7, "resume": resume}
        settings = {**EIGHT, "rollout": {"group_size": 4}, "train": {"iterations": iterations}}
        Trainer.from_config(tiny_config(path, run=run, **settings)).run()
    Trainer.from_config(tiny_config(path, folder / "straight", **settings)).run()
    said = {"same": same, "held": sum(t.numel() * 4 for t in shards.values()), "whole": whole_peak, "sharded": peak}
    (folder / f"rank {dist.get_rank()}.json").write_text(json.dumps(said))
