"""The model families: one file each, found by name."""

from __future__ import annotations

import importlib

import torch

from fastgrpo.config import Model
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.models.base import Conditioning, ModelFamily

FAMILIES = {"flux": "fastgrpo.models.flux:Flux"}

__all__ = ["FAMILIES", "Conditioning", "ModelFamily", "family_class", "load_family"]


def family_class(name: str) -> type[ModelFamily]:
    """The class of a family. Raises ConfigError, with the nearest match."""
    if name not in FAMILIES:
        raise ConfigError(
            f"model.family: unknown family '{name}'; {nearest(name, FAMILIES)}(one of: {', '.join(sorted(FAMILIES))})"
        )
    module, _, attribute = FAMILIES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.family: '{name}' needs {error.name}, which is not installed; pip install 'fastgrpo[train]'"
        ) from None


def load_family(config: Model, device: torch.device) -> ModelFamily:
    """A family with its weights on `device`. Raises ConfigError for a path that holds no such pipeline."""
    return family_class(config.family).from_config(config, device)
