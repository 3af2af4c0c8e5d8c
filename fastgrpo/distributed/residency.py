"""What stays on every rank between uses: decided by bytes, or by the settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastgrpo.config import Config
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.distributed.adamw_8bit import STATE_BYTES
from fastgrpo.distributed.shards import local
from fastgrpo.distributed.world import World


@dataclass(frozen=True)
class Residency:
    """What stays on every rank between uses: weights for a whole rollout or a whole optimizer step, unsharded,
    and gradients unreduced until its last micro-batch."""

    rollout_unsharded: bool
    update_unsharded: bool
    sync_once: bool


KEPT = Residency(True, True, True)

# Shares of a device's memory below which `auto` keeps things: a rollout has little else to hold, an update has its
# activations, and float32 gradients come on top of all.
ROLLOUT_SHARE, UPDATE_SHARE, GRADIENT_SHARE = 0.75, 0.5, 0.1


def residency(config: Config, policy: nn.Module, world: World, copies: Iterable[nn.Module] = ()) -> Residency:
    """The settings rollout.gather, update.gather and update.grad_sync, with `auto` decided by bytes: the training
    state of a rank beside the unsharded weights, against its device's memory (where that is unknown, all is kept)."""
    return decide_residency(config, *kept_bytes(config, policy, copies), world.memory)


def kept_bytes(config: Config, policy: nn.Module, copies: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """Bytes of a rank: its training state, and copies of components, beside the unsharded weights; unreduced
    gradients."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = [t for module in (policy, *copies) for t in (*module.parameters(), *module.buffers())]
    held = sum(p.numel() * p.element_size() for p in map(local, weights))
    # AdamW's moments, and the EMA.
    moments = STATE_BYTES if config.update.optimizer.kind == "adamw_8bit" else 8
    state = sum(map(torch.Tensor.numel, map(local, trained))) * (moments + (4 if config.update.ema_decay else 0))
    compute = DTYPES[config.model.dtype].itemsize
    whole = sum(p.numel() * compute for p in policy.parameters() if isinstance(p, DTensor))
    return int(held + state + whole), 4 * sum(p.numel() for p in trained)


def decide_residency(config: Config, resident: int, gradients: int, memory: int) -> Residency:
    """`residency` of `kept_bytes` and a device's memory."""

    def decided(setting: str, kept: str, need: float, share: float) -> bool:
        return setting == kept or (setting == "auto" and (memory == 0 or need <= share * memory))

    return Residency(
        decided(config.rollout.gather, "once", resident, ROLLOUT_SHARE),
        decided(config.update.gather, "once", resident, UPDATE_SHARE),
        decided(config.update.grad_sync, "once", gradients, GRADIENT_SHARE),
    )
