"""8-bit AdamW (arXiv 2110.02861): bitsandbytes' kernel on each rank's shards, without a host read.

Both moments are bytes, with a float32 scale for each block of 256: 2.03 bytes a weight in place of 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.config import Optimizer
from fastgrpo.distributed.shards import local
from fastgrpo.errors import require

BLOCK = 256

# Bytes of state of a weight: two moments and their scales.
STATE_BYTES = 2 + 2 * 4 / BLOCK

# Smaller tensors (norms, biases) keep float32 moments, as bitsandbytes' own optimizer has it.
SMALLEST = 4096


def check_optimizer(config: Optimizer) -> None:
    """Raises UserError where the optimizer needs a package that is not installed; loads nothing."""
    if config.kind == "adamw_8bit":
        require("bitsandbytes", "update.optimizer.kind: adamw_8bit")


class AdamW8bit:
    """AdamW of parameters whose moments are 8-bit; with FSDP2 of this rank's shards of them, in blocks of a shard.

    A step that is skipped leaves weights and moments as they were, and counts in the bias correction.
    """

    def __init__(self, named: Mapping[str, Tensor], config: Optimizer) -> None:
        self.named, self.config = dict(named), config
        # Of each parameter, the steps that it had a gradient in.
        self.steps = np.zeros(len(self.named), dtype=np.int64)
        self.moments = {name: _moments(local(p)) for name, p in self.named.items()}
        self.first = next(iter(self.named.values()))
        self.maps = self.byte_values(self.first.device)

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor) -> None:
        """One step on the gradients, which are cleared; none where `skipped` (float32 scalar on the device) is 1."""
        skip = skipped.bool()
        for i, (name, parameter) in enumerate(self.named.items()):
            if parameter.grad is None:
                continue
            self.steps[i] += 1
            weight, grad = local(parameter), local(parameter.grad)
            parameter.grad = None
            if weight.numel() == 0:
                continue
            # One tensor's worth of copies at a time: the kernel cannot be told to leave things as they are.
            moments = self.moments[name]
            changed = [weight, *moments.values()]
            before = [tensor.clone() for tensor in changed]
            self.update_shard(weight, grad.contiguous().masked_fill_(skip, 0.0), moments, int(self.steps[i]), lr)
            for tensor, old in zip(changed, before, strict=True):
                torch.where(skip, old, tensor, out=tensor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, filled in place by one: it goes on with as many shards alone, and names them."""
        held = {name: dict(moments) for name, moments in self.moments.items() if moments["exp_avg"].numel()}
        return {f"shard {_place(self.first)}": {"steps": torch.from_numpy(self.steps), **held}}

    def byte_values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values [256] float32 that the bytes of the first and of the second moment stand for."""
        from bitsandbytes.functional import create_dynamic_map

        return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)

    def update_shard(self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], step: int, lr: float) -> None:
        """Changes a shard and its moments in place."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        opt = self.config
        optimizer_update_8bit_blockwise(
            "adam", grad, weight, moments["exp_avg"], moments["exp_avg_sq"], opt.beta1, opt.beta2, 0.0, 0.0, opt.eps,
            step, lr, self.maps[0], self.maps[1], moments["scale"], moments["scale_sq"], opt.weight_decay,
        )  # fmt: skip


def _moments(shard: Tensor) -> dict[str, Tensor]:
    """Of a new optimizer; with scales of 0 any byte stands for 0."""
    blocks = -(-shard.numel() // BLOCK)
    made = {
        name: torch.zeros(shard.shape, dtype=torch.uint8, device=shard.device) for name in ("exp_avg", "exp_avg_sq")
    }
    return made | {name: torch.zeros(blocks, device=shard.device) for name in ("scale", "scale_sq")}


def _place(parameter: Tensor) -> str:
    """Which shard of how many this rank holds."""
    if not isinstance(parameter, DTensor):
        return "1 of 1"
    mesh = parameter.device_mesh
    sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    here, count = 0, 1
    for dim in sharded:
        here, count = here * mesh.size(dim) + coordinate[dim], count * mesh.size(dim)
    return f"{here + 1} of {count}"
