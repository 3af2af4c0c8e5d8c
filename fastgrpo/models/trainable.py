"""Which layers a LoRA goes on: told by name, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastgrpo.errors import ConfigError, nearest


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
