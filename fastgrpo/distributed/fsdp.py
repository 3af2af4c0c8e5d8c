"""FSDP2: sharding, what stays unsharded between uses, and when gradients are reduced.

One precision mechanism at every world size: its mixed-precision policy (float32 masters and reductions, compute in
model.dtype), at one rank too; a float32 run on one rank needs no wrapping and gets none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastgrpo.config import Config
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.distributed.world import World


def shard(transformer: nn.Module, blocks: list[nn.Module], world: World, config: Config) -> None:
    """Shards the transformer block by block (FSDP2), in place; computes in model.dtype, keeps and reduces in float32.

    Inputs are not cast by FSDP: timesteps and guidance must reach the embedder unrounded. With parallel.frozen
    replicate, what is not trained stays whole on every rank, and is never unsharded.
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


@contextmanager
def unsharded(modules: Iterable[nn.Module], on: bool) -> Iterator[None]:
    """Within it, if `on`, weights stay unsharded from their first use; without gradients alone. Changes no bit."""
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
    """Weights stay unsharded after the next forward, and after its backward but for the `last` of an optimizer step."""
    for part in _sharded_parts([module]):
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(last, recurse=False)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Weights are unsharded anew before the next forward: FSDP2 leaves a root's unsharded after one, and the next would
    use them, whatever changed. A root may stand within a module that is not sharded itself."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _sharded_parts(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    # Where anything is sharded the root is: without, no module is walked, once for every micro-batch.
    roots = [module for module in modules if isinstance(module, FSDPModule)]
    return [part for root in roots for part in root.modules() if isinstance(part, FSDPModule)]


def set_gradient_sync(transformer: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks; nothing to do where nothing is sharded."""
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(on)
