"""What of a pipeline is trained: every weight, named parts of it, or a new LoRA; and what a KL term compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastgrpo.config.schema import Lora
from fastgrpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fastgrpo.models.protocol import ModelFamily


def make_trainable(family: ModelFamily) -> None:
    """Turns on the gradients of what the config trains: a new LoRA, model.trainable, or every weight.

    Raises:
        ConfigError: For names that match nothing.
    """
    config, policy = family.config, family.policy
    if config.lora:
        add_lora(family.modules.values(), config.lora, family.lora_targets)
        return
    parts = config.trainable
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(parts is None or any(f".{part}." in f".{name}." for part in parts))
    for part in parts or ():
        if not any(f".{part}." in f".{name}." for name, _ in policy.named_parameters()):
            names = sorted({p for name, _ in policy.named_parameters() for p in name.split(".")[:-1]})
            known = [name for name in names if not name.isdigit()]
            raise ConfigError(
                f"model.trainable: '{part}' matches no parameter; {nearest(part, known)}"
                f"(parts of their names: {', '.join(known)})"
            )


def add_lora(modules: Iterable[nn.Module], lora: Lora, default_targets: Sequence[str]) -> None:
    """Adds trainable float32 LoRA layers (PEFT) to frozen components. Raises ConfigError for a target without layer."""
    from peft import LoraConfig

    targets = list(lora.targets or default_targets)
    for module in modules:
        check_targets(targets, module)
        # PEFT's alpha may be any number, whatever its annotation says.
        adapter = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=targets)
        cast(Any, module).add_adapter(adapter)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


@contextmanager
def lora_disabled(policy: nn.Module) -> Iterator[None]:
    """Within it a policy is without its LoRA: the reference model of a LoRA run."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


Reference = Callable[[], AbstractContextManager[Mapping[str, nn.Module] | None]]


def reference_of(policy: nn.Module, frozen: Mapping[str, nn.Module] | None) -> Reference:
    """What gives a KL term's reference components: frozen copies, or (None) the policy's own with its LoRA off."""
    return partial(lora_disabled, policy) if frozen is None else lambda: nullcontext(frozen)


def check_targets(targets: Sequence[str], module: nn.Module) -> None:
    """Raises ConfigError for a target that no layer of `module` ends in, with what they do end in."""
    layers = [name.split(".") for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    # The 0 of to_out.0 says nothing alone.
    ends = sorted({".".join(name[-2:] if name[-1].isdigit() else name[-1:]) for name in layers})
    for target in targets:
        parts = target.split(".")
        if not any(name[-len(parts) :] == parts for name in layers):
            raise ConfigError(
                f"model.lora.targets: '{target}' matches no layer; {nearest(target, ends)}"
                f"(layers end in: {', '.join(ends)})"
            )


def without_weights(config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model of a config.json, on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)
