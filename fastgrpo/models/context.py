"""What context parallelism asks of a model: the token sequences that it splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgrpo.config import Config
from fastgrpo.distributed.ulysses import check_split, head_count
from fastgrpo.errors import ConfigError
from fastgrpo.models.protocol import ModelFamily


def check_context(config: Config, cls: type[ModelFamily], parts: Mapping[str, Mapping[str, Any]], device: str) -> None:
    """Raises ConfigError for context parallelism that a model cannot have, from its components' configs alone.

    config: of the run. parts: as `read_configs` gives them.
    """
    size, method, kinds = config.parallel.context, config.parallel.context_kind, cls.context_kinds
    if method not in kinds:
        other = f"set parallel.context_kind to {' or '.join(kinds)}, or leave it at 1" if kinds else "leave it at 1"
        raise ConfigError(
            f"parallel.context: {size}, but the tokens of {cls.name} cannot be split by {method}; {other}"
        )
    if method == "ring" and device == "cpu":
        raise ConfigError("parallel.context_kind: ring attention needs GPUs; on a CPU use ulysses")
    heads = next(head_count(parts[name]) for name in cls.trained if name in parts)
    check_split(size, heads, cls.token_lengths(config.model, parts), method)


def split_lengths(family: ModelFamily) -> list[int]:
    """`token_lengths` of a family that is loaded."""
    return family.token_lengths(family.config, family.component_configs)
