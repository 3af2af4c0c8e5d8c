"""A family's weights made ready to train: adapters, backends, compilation, checkpointing, sharding, loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fastgrpo.algorithms.objectives import forward_objective
from fastgrpo.config import Config
from fastgrpo.distributed.activation import checkpoint_activations, compile_blocks
from fastgrpo.distributed.fsdp import shard, unsharded
from fastgrpo.distributed.residency import Residency
from fastgrpo.distributed.ulysses import split_tokens
from fastgrpo.distributed.world import World
from fastgrpo.models.attention import set_backend
from fastgrpo.models.context import split_lengths
from fastgrpo.models.protocol import ModelFamily
from fastgrpo.models.sharded_load import load_shards
from fastgrpo.models.trainable import (
    OldPolicy,
    Reference,
    add_old_lora,
    freeze_old_lora,
    load_lora,
    make_trainable,
    reference_of,
)


@dataclass(frozen=True)
class Copies:
    """What a policy is compared with.

    Attributes:
        frozen: The reference model's components in full fine-tuning; None where no term needs them, or a LoRA can be
            turned off.
        reference: Gives the components of the model that the run starts from; None where nothing is compared with it.
        old: The old policy; None where none is kept.
    """

    frozen: dict[str, nn.Module] | None
    reference: Reference | None
    old: OldPolicy | None

    def modules(self) -> list[nn.Module]:
        """All components that are not the policy's own."""
        return [*(self.frozen or {}).values(), *self.old_modules()]

    def old_modules(self) -> list[nn.Module]:
        """Those of the old policy."""
        return [] if self.old is None or self.old.modules is None else list(self.old.modules.values())


def needs_reference(config: Config) -> bool:
    """Whether a run compares with the model that it starts from."""
    objective = forward_objective(config)
    return config.objective.kl_weight > 0 or (objective is not None and objective.against == "reference")


def needs_old(config: Config) -> bool:
    """Whether a run keeps an old policy: with one optimizer step an iteration a copy would be the policy itself."""
    objective, update = forward_objective(config), config.update
    several = update.optimizer_steps * update.epochs * update.replay > 1
    return objective is not None and objective.against == "old" and (several or not config.objective.old_decay.copies)


def prepare_weights(
    family: ModelFamily, config: Config, world: World, fill: Callable[[nn.Module], None] | None = None
) -> Copies:
    """Makes trainable what the config trains, with checkpointing and sharding, in place; gives what it is compared
    with, sharded alike. fill: called on every module before it is sharded."""
    torch.manual_seed(config.run.seed)
    frozen: dict[str, nn.Module] = {}
    old: dict[str, nn.Module] = {}
    if needs_reference(config) and not config.model.lora:
        frozen = {name: copy.deepcopy(module).to(family.dtype) for name, module in family.modules.items()}
    make_trainable(family)
    if fill is None:
        # A plan has no values to begin with.
        load_lora(family)
    if needs_old(config) and config.model.lora:
        add_old_lora(family.modules.values(), config.model.lora, family.lora_targets)
    elif needs_old(config):
        # Float32 masters as the policy's: it follows by less than bfloat16 could hold.
        old = {name: copy.deepcopy(module) for name, module in family.modules.items()}
    others = [*frozen.items(), *old.items()]
    for module in (*family.modules.values(), *(m for _, m in others)):
        set_backend(module, config.model.attention_backend)
        if world.context > 1:
            kind = config.parallel.context_kind
            plan, tokens = family.context_plan(module), split_lengths(family)
            split_tokens(module, plan, tokens, world.ranks, world.context, world.device.type, kind)
    for module in (*family.modules.values(), *(m for _, m in others)):
        if config.model.compile == "blocks":
            compile_blocks(family.blocks(module))
    for module in family.modules.values():
        checkpoint_activations(family.blocks(module), config.model.activation_checkpointing)
    for name, module in (*family.modules.items(), *others):
        if fill is not None:
            fill(module)
        shard(module, family.blocks(module), world, config)
        if name in family.weight_files:
            load_shards(module, family.weight_files[name], world.device)
    freeze_old_lora(family.policy)
    for module in old.values():
        module.requires_grad_(False)
    reference = reference_of(family.policy, frozen or None) if needs_reference(config) else None
    return Copies(frozen or None, reference, OldPolicy(family.policy, old or None) if needs_old(config) else None)


@contextmanager
def rolling_out(
    family: ModelFamily, config: Config, copies: Copies, residency: Residency
) -> Iterator[Mapping[str, nn.Module]]:
    """Gives the components that roll out: the policy's, or the old policy's where its weights differ from it.

    Within it they stay unsharded from their first use, where `residency` says so.
    """
    old = None if config.objective.old_decay.copies else copies.old
    with nullcontext() if old is None else old() as components:
        modules = components or family.modules
        with unsharded(modules.values(), residency.rollout_unsharded):
            yield modules
