"""Which attention kernels the trained components use: diffusers' backends, by name (model.attention_backend)."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from fastgrpo.errors import ConfigError, missing, nearest

# The package that backends of a family of names need; those of PyTorch need none.
PACKAGES = {"flash": "flash_attn", "flash_varlen": "flash_attn", "xformers": "xformers"}


def check_backend(name: str | None, context: int = 1) -> None:
    """Raises ConfigError for a backend that diffusers does not know, that is not installed here, or that cannot split
    tokens; UserError, naming the extra, for a missing package. Loads no weights."""
    if name is None:
        return
    from diffusers.models import attention_dispatch as dispatch

    known = [backend.value for backend in dispatch.AttentionBackendName]
    if name not in known:
        raise ConfigError(
            f"model.attention_backend: unknown backend '{name}'; {nearest(name, known)}(one of: {', '.join(known)})"
        )
    package = "kernels" if "hub" in name else PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise missing(package, f"model.attention_backend: {name}")
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        raise ConfigError(f"model.attention_backend: {name}: {error}") from None
    if context > 1 and name not in dispatch._AttentionBackendRegistry._supports_context_parallel:
        able = ", ".join(sorted(dispatch._AttentionBackendRegistry._supports_context_parallel))
        raise ConfigError(f"model.attention_backend: {name} cannot split tokens (parallel.context); one of: {able}")


def set_backend(module: nn.Module, name: str | None) -> None:
    """Every attention of a diffusers component by one backend, in place; the others' are left as they are.

    Raises ConfigError for a component whose attention does not go through diffusers' dispatch.
    """
    if name is None:
        return
    from diffusers.models import attention_dispatch as dispatch

    processors: list[Any] = [getattr(part, "processor", None) for part in module.modules()]
    chosen = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if not chosen:
        raise ConfigError(f"model.attention_backend: {name}, but {type(module).__name__} takes no backend of diffusers")
    backend = dispatch.AttentionBackendName(name)
    dispatch._maybe_download_kernel_for_backend(backend)
    for processor in chosen:
        # Of the instance; a class that has it holds it for all of its processors.
        processor._attention_backend = backend
