"""This process among its peers: ranks, devices, and the mesh that weights are sharded over."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgrpo.config import Config
from fastgrpo.distributed.signals import meeting
from fastgrpo.errors import ConfigError, UserError

# What launchers other than torchrun call the number of a process.
TASKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


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
    Raises UserError where ranks cannot meet.
    """
    memory, ranks, local = this_machine()
    rank = launched().rank
    check_world(config, ranks, local)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", launched().local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if sharded(config, ranks) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks == 1 else {}
        try:
            with meeting():
                dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout), **alone)
        except dist.DistNetworkError as error:
            # A port that is taken, or a host that is not reached: no rank is lost yet.
            place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            reason = str(error).partition(". ")[0]
            raise UserError(f"MASTER_PORT: ranks cannot meet at {place}: {reason}") from None
    world = make_world(config, ranks, rank, device)
    return replace(world, memory=int(world.gather(np.array([float(memory)])).min()))


class Launch(NamedTuple):
    """The processes that a launcher started together, and which of them this is."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def launched() -> Launch:
    """This process as torchrun's variables describe it; without them, alone.

    Raises UserError, which every rank says, where they are incomplete or contradict one another.
    """
    ranks = environment_number("WORLD_SIZE", 1)
    if ranks > 1 and (lacking := [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]):
        raise UserError(
            f"{lacking[0]}: not set, and WORLD_SIZE is {ranks}; start ranks by torchrun, or by configs/launch/slurm.sh"
        )
    found = Launch(
        environment_number("RANK", 0),
        ranks,
        environment_number("LOCAL_RANK", 0),
        environment_number("LOCAL_WORLD_SIZE", ranks),
    )
    if not 0 <= found.rank < ranks:
        raise UserError(
            f"RANK: {found.rank}, and WORLD_SIZE is {ranks}; every rank is told both, and they count from 0"
        )
    task = next((name for name in TASKS if environment_number(name, 0) > 0), None)
    if task is not None and not os.environ.get("WORLD_SIZE"):
        raise UserError(
            f"WORLD_SIZE: not set, and {task} is {os.environ[task]}: every task would train alone; start them by "
            "configs/launch/slurm.sh, or set WORLD_SIZE=1 where each is a run of its own"
        )
    return found


def environment_number(name: str, default: int) -> int:
    """A variable of the environment; `default` where it is not set, or empty."""
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: '{text}' is not a number; torchrun sets it") from None


def this_machine() -> tuple[int, int, int]:
    """(bytes of this rank's device, ranks in all, ranks of this node), as torchrun describes them."""
    launch = launched()
    if torch.cuda.is_available():
        if launch.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"LOCAL_RANK: {launch.local_rank}, and this process sees {count} GPUs; start one rank a GPU, or set "
                "LOCAL_RANK=0 where a scheduler gives each task a GPU of its own"
            )
        memory = torch.cuda.get_device_properties(launch.local_rank).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory, launch.ranks, launch.local_ranks


def sharded(config: Config, ranks: int) -> bool:
    """Whether FSDP2 wraps the model."""
    return config.parallel.fsdp == "on" or ranks > 1 or config.model.dtype != "float32"


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
