"""A family's weights made ready to train: adapters, backends, compilation, checkpointing, sharding, loading."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from fastgrpo.config import Config
from fastgrpo.distributed.activation import checkpoint_activations, compile_blocks
from fastgrpo.distributed.fsdp import shard
from fastgrpo.distributed.ulysses import split_tokens
from fastgrpo.distributed.world import World
from fastgrpo.models.attention import set_backend
from fastgrpo.models.context import split_lengths
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.models.sharded_load import load_shards
from fastgrpo.models.trainable import load_lora, make_trainable


def prepare_weights(
    family: ModelFamily, config: Config, world: World, fill: Callable[[nn.Module], None] | None = None
) -> dict[str, nn.Module] | None:
    """Makes trainable what the config trains, with checkpointing and sharding, in place; gives the frozen copies that a
    KL term of full fine-tuning compares with. fill: called on every module before it is sharded."""
    torch.manual_seed(config.run.seed)
    frozen: dict[str, nn.Module] = {}
    if config.objective.kl_weight and not config.model.lora:
        frozen = {name: copy.deepcopy(module).to(family.dtype) for name, module in family.modules.items()}
    make_trainable(family)
    if fill is None:
        # A plan has no values to begin with.
        load_lora(family)
    for module in (*family.modules.values(), *frozen.values()):
        set_backend(module, config.model.attention_backend)
        if world.context > 1:
            kind = config.parallel.context_kind
            plan, tokens = family.context_plan(module), split_lengths(family)
            split_tokens(module, plan, tokens, world.ranks, world.context, world.device.type, kind)
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
