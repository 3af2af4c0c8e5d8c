"""Ranks, devices, FSDP2 sharding and activation checkpointing.

One precision mechanism at every world size: FSDP2's mixed-precision policy (float32 masters and reductions, compute
in model.dtype), at one rank too; a float32 run on one rank needs no wrapping and gets none.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastgrpo.adamw_8bit import STATE_BYTES
from fastgrpo.config import Config
from fastgrpo.context import split_lengths, split_tokens
from fastgrpo.errors import ConfigError
from fastgrpo.models.attention import set_backend
from fastgrpo.models.base import DTYPES, ModelFamily
from fastgrpo.models.sharded_load import load_shards


@dataclass(frozen=True)
class World:
    """This process among its peers.

    rank, size: among the ranks that have samples of their own; those of one context group have the same samples, and
    are one of these. mesh: [shard] or [replicate, shard], over all ranks; None where nothing is sharded. memory: bytes
    of a device, the smallest of all ranks; 0: not known.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    context: int = 1
    context_rank: int = 0
    memory: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0 and self.context_rank == 0

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.size * self.context

    @property
    def process(self) -> int:
        """This one's number among all."""
        return self.rank * self.context + self.context_rank

    def gather(self, vector: np.ndarray) -> np.ndarray:
        """[size, len] of every rank's float64 vector [len], on the host; of a context group, its first rank's."""
        return self.gather_all(vector)[:: self.context]

    def gather_all(self, vector: np.ndarray) -> np.ndarray:
        """[ranks, len] of every process's float64 vector [len], on the host."""
        if self.ranks == 1:
            return vector[None]
        mine = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
        everyone = torch.empty(self.ranks, len(mine), dtype=torch.float64)
        dist.all_gather_into_tensor(everyone.view(-1), mine)
        return everyone.numpy()

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def start_world(config: Config) -> World:
    """Joins the process group that torchrun describes; alone, one is made only where sharding needs it.

    Raises ConfigError for a mesh that these ranks do not make, and for samples that they cannot share equally.
    """
    memory, ranks, local = this_machine()
    rank = int(os.environ.get("RANK", "0"))
    check_world(config, ranks, local)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if (sharded(config, ranks)) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
    world = make_world(config, ranks, rank, device)
    return replace(world, memory=int(world.gather(np.array([float(memory)])).min()))


def this_machine() -> tuple[int, int, int]:
    """(bytes of this rank's device, ranks in all, ranks of this node), as torchrun describes them."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def sharded(config: Config, ranks: int) -> bool:
    """Whether FSDP2 wraps the model."""
    return config.parallel.fsdp == "on" or ranks > 1 or config.model.dtype == "bfloat16"


def make_world(config: Config, ranks: int, rank: int, device: torch.device) -> World:
    """The world of a process group that exists, or of one rank without. `check_world` has been called."""
    context = config.parallel.context
    mesh = None
    if sharded(config, ranks):
        replicas = config.parallel.replicate
        shape, names = (
            ((replicas, ranks // replicas), ("replicate", "shard")) if replicas > 1 else ((ranks,), ("shard",))
        )
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return World(rank // context, ranks // context, device, mesh, context, rank % context)


def check_world(config: Config, ranks: int, local: int) -> None:
    """Raises ConfigError unless `ranks` processes, `local` of them on each node, make the mesh of `parallel`, and share
    an iteration's samples equally. Called before anything loads."""
    parallel = config.parallel
    fixed = parallel.replicate * parallel.context
    if ranks % fixed or (parallel.shard != "auto" and ranks != fixed * parallel.shard):
        shape = f"replicate {parallel.replicate} × shard {parallel.shard} × context {parallel.context}"
        wanted = f"a multiple of {fixed}" if parallel.shard == "auto" else f"{fixed * parallel.shard}"
        raise ConfigError(f"parallel: {shape} needs {wanted} ranks, and there are {ranks}; torchrun starts the ranks")
    if local % parallel.context:
        raise ConfigError(
            f"parallel.context: groups of {parallel.context} ranks do not fit nodes of {local}; make it a divisor of "
            f"{local}"
        )
    if parallel.fsdp == "off" and ranks > 1:
        raise ConfigError("parallel.fsdp: off, but there are several ranks, whose gradients FSDP2 reduces; use auto")
    if parallel.load == "sharded" and not sharded(config, ranks):
        raise ConfigError("parallel.load: sharded, but one rank in float32 shards nothing; set it to whole")
    samples = config.rollout.prompts_per_iteration * config.rollout.candidates
    size = ranks // parallel.context
    shares = size * config.update.optimizer_steps
    if samples % shares:
        groups = f"{size} context groups" if parallel.context > 1 else f"{size} ranks"
        raise ConfigError(
            f"rollout.prompts_per_iteration: {samples} samples an iteration do not divide over {groups} × "
            f"{config.update.optimizer_steps} optimizer steps; make prompts × group_size a multiple of {shares}"
        )


def prepare_weights(
    family: ModelFamily, config: Config, world: World, fill: Callable[[nn.Module], None] | None = None
) -> dict[str, nn.Module] | None:
    """Makes trainable what the config trains, with checkpointing and sharding, in place; gives the frozen copies that a
    KL term of full fine-tuning compares with. fill: called on every module before it is sharded."""
    torch.manual_seed(config.run.seed)
    frozen: dict[str, nn.Module] = {}
    if config.objective.kl_weight and not config.model.lora:
        frozen = {name: copy.deepcopy(module).to(family.dtype) for name, module in family.modules.items()}
    family.make_trainable()
    for module in (*family.modules.values(), *frozen.values()):
        set_backend(module, config.model.attention_backend)
        if world.context > 1:
            kind = config.parallel.context_kind
            split_tokens(module, split_lengths(family), world.ranks, world.context, world.device.type, kind)
    for module in (*family.modules.values(), *frozen.values()):
        if config.model.compile == "blocks":
            compile_blocks(family.blocks(module))
    for module in family.modules.values():
        checkpoint_activations(family.blocks(module), config.model.activation_checkpointing)
    for name, module in (*family.modules.items(), *frozen.items()):
        if fill is not None:
            fill(module)
        shard(module, family.blocks(module), world, config)
        if name in family.weight_files:
            load_shards(module, family.weight_files[name], world.device)
    return frozen or None


def shard(transformer: nn.Module, blocks: list[nn.Module], world: World, config: Config) -> None:
    """Shards the transformer block by block (FSDP2), in place; computes in model.dtype, keeps and reduces in float32.

    Inputs are not cast by FSDP: timesteps and guidance must reach the embedder unrounded. With parallel.frozen
    replicate, what is not trained stays whole on every rank, and is never gathered.
    """
    if world.mesh is None:
        return
    compute = DTYPES[config.model.dtype]
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, output_dtype=compute, cast_forward_inputs=False
    )
    for parameter in transformer.parameters():
        # A UNet's convolutions lie channels last, which FSDP2 does not take.
        parameter.data = parameter.data.contiguous()
    keeps = config.parallel.frozen == "replicate"
    whole = {p for p in transformer.parameters() if not p.requires_grad} if keeps else None
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(transformer, mesh=world.mesh, mp_policy=policy, ignored_params=whole)


@dataclass(frozen=True)
class Residency:
    """What stays on every rank between uses: weights gathered for a whole rollout, for a whole optimizer step, and
    gradients unreduced until its last micro-batch."""

    rollout_gathered: bool
    update_gathered: bool
    sync_once: bool


KEPT = Residency(True, True, True)

# Shares of a device's memory below which `auto` keeps things: a rollout has little else to hold, an update has its
# activations, and float32 gradients come on top of all.
ROLLOUT_SHARE, UPDATE_SHARE, GRADIENT_SHARE = 0.75, 0.5, 0.1


def residency(config: Config, policy: nn.Module, world: World) -> Residency:
    """The settings rollout.gather, update.gather and update.grad_sync, with `auto` decided by bytes: the training
    state of a rank beside the gathered weights, against its device's memory (where that is unknown, all is kept)."""
    return decide_residency(config, *kept_bytes(config, policy), world.memory)


def kept_bytes(config: Config, policy: nn.Module) -> tuple[int, int]:
    """Bytes of a rank: its training state beside the gathered weights; unreduced gradients."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    held = sum(p.numel() * p.element_size() for p in map(local, (*policy.parameters(), *policy.buffers())))
    # AdamW's moments, and the EMA.
    moments = STATE_BYTES if config.update.optimizer.kind == "adamw_8bit" else 8
    state = sum(map(torch.Tensor.numel, map(local, trained))) * (moments + (4 if config.update.ema_decay else 0))
    compute = DTYPES[config.model.dtype].itemsize
    gathered = sum(p.numel() * compute for p in policy.parameters() if isinstance(p, DTensor))
    return int(held + state + gathered), 4 * sum(p.numel() for p in trained)


def decide_residency(config: Config, resident: int, gradients: int, memory: int) -> Residency:
    """`residency` of `kept_bytes` and a device's memory."""

    def decided(setting: str, kept: str, need: float, share: float) -> bool:
        return setting == kept or (setting == "auto" and (memory == 0 or need <= share * memory))

    return Residency(
        decided(config.rollout.gather, "once", resident, ROLLOUT_SHARE),
        decided(config.update.gather, "once", resident, UPDATE_SHARE),
        decided(config.update.grad_sync, "once", gradients, GRADIENT_SHARE),
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that this rank holds, without its history."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def gathered(modules: Iterable[nn.Module], on: bool) -> Iterator[None]:
    """Within it, if `on`, weights stay gathered from their first use; without gradients alone. Changes no bit."""
    roots = list(modules) if on else []
    parts = _sharded_parts(roots)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # FSDP2 frees blocks after their forward, and keeps a root's own weights for its backward.
            part.set_reshard_after_forward(not any(part is root for root in roots), recurse=False)


def hold_weights(module: nn.Module, last: bool) -> None:
    """Weights stay gathered after the next forward, and after its backward but for the `last` of an optimizer step."""
    for part in _sharded_parts([module]):
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(last, recurse=False)


def _sharded_parts(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def set_gradient_sync(transformer: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks; nothing to do where nothing is sharded."""
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(on)


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compiles the forward of each block, in place, below what checkpointing and FSDP2 add. Blocks that are alike share
    their code: it is compiled once."""
    for block in blocks:
        block.forward = torch.compile(block.forward)


def checkpoint_activations(blocks: list[nn.Module], setting: str | int) -> None:
    """Recomputes blocks in backward instead of keeping their activations: none, all, every k-th block, or selective,
    all blocks but for the outputs of their matrix products and attention.

    `auto` has been replaced by one of them (fastgrpo/plan.py); it raises ValueError here.
    """
    if setting == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, saved_operations()) if setting == "selective" else None
    every = 1 if setting in ("all", "selective") else int(setting)
    for block in blocks[::every]:
        block.forward = partial(_recomputed, block.forward, contexts)


def _recomputed(forward, contexts, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    selective = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **selective, **kwargs)


def saved_operations() -> list[Any]:
    """What selective checkpointing keeps: matrix products and attention, by far the most of a block's work."""
    aten = torch.ops.aten
    names = (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )  # fmt: skip
    return [getattr(aten, name).default for name in names]
