"""Ranks, devices, FSDP2 sharding and activation checkpointing.

One precision mechanism at every world size: FSDP2's mixed-precision policy (float32 masters and reductions, compute
in model.dtype), at one rank too; a float32 run on one rank needs no wrapping and gets none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from fastgrpo.config import Config
from fastgrpo.errors import ConfigError
from fastgrpo.models.base import DTYPES


@dataclass(frozen=True)
class World:
    """This process among its peers. mesh: None where nothing is sharded."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, vector: np.ndarray) -> np.ndarray:
        """[size, len] of every rank's float64 vector [len], on the host."""
        if self.size == 1:
            return vector[None]
        mine = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
        everyone = torch.empty(self.size, len(mine), dtype=torch.float64)
        dist.all_gather_into_tensor(everyone.view(-1), mine)
        return everyone.numpy()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_world(config: Config) -> World:
    """Joins the process group that torchrun describes; alone, one is made only where sharding needs it.

    Raises ConfigError for numbers of samples that the ranks cannot share equally.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    shares = size * config.update.optimizer_steps
    if samples % shares:
        raise ConfigError(
            f"rollout.prompts_per_iteration: {samples} samples an iteration do not divide over {size} ranks × "
            f"{config.update.optimizer_steps} optimizer steps; make prompts × group_size a multiple of {shares}"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wanted = config.parallel.fsdp == "on" or size > 1 or config.model.dtype == "bfloat16"
    if config.parallel.fsdp == "off" and size > 1:
        raise ConfigError("parallel.fsdp: off, but there are several ranks, whose gradients FSDP2 reduces; use auto")
    if not wanted:
        return World(rank, size, device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
    return World(rank, size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("shard",)))


def shard(transformer: nn.Module, blocks: list[nn.Module], world: World, dtype: str) -> None:
    """Shards the transformer block by block (FSDP2), in place; computes in `dtype`, keeps and reduces in float32.

    Inputs are not cast by FSDP: timesteps and guidance must reach the embedder unrounded.
    """
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[dtype], reduce_dtype=torch.float32, output_dtype=DTYPES[dtype], cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(transformer, mesh=world.mesh, mp_policy=policy)


def set_gradient_sync(transformer: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks; nothing to do where nothing is sharded."""
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(on)


def checkpoint_activations(blocks: list[nn.Module], setting: str | int) -> None:
    """Recomputes blocks in backward instead of keeping their activations: none, all, or every k-th block."""
    if setting == "none":
        return
    every = 1 if setting == "all" else int(setting)
    for block in blocks[::every]:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
