"""What context parallelism asks of a model: the token sequences that it splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgrpo.distributed.ulysses import check_split
from fastgrpo.errors import ConfigError


def check_context(config: Any, kinds: Sequence[str], parts: Mapping[str, Mapping[str, Any]], device: str) -> None:
    """Raises ConfigError for context parallelism that a model cannot have, from its components' configs alone.

    config: of the run. kinds: those that the family has. parts: as `ModelFamily.read_configs` gives them.
    """
    family, size, method = config.model.family, config.parallel.context, config.parallel.context_kind
    if method not in kinds:
        other = f"set parallel.context_kind to {' or '.join(kinds)}, or leave it at 1" if kinds else "leave it at 1"
        raise ConfigError(f"parallel.context: {size}, but the tokens of {family} cannot be split by {method}; {other}")
    if method == "ring" and device == "cpu":
        raise ConfigError("parallel.context_kind: ring attention needs GPUs; on a CPU use ulysses")
    transformer = parts.get("transformer") or parts["transformer_2"]
    check_split(
        size, transformer["num_attention_heads"], token_lengths(config.model, transformer, parts["vae"]), method
    )


def split_lengths(family: Any) -> list[int]:
    """`token_lengths` of a family that is loaded."""
    return token_lengths(family.config, family.transformer.config, family.pipeline.vae.config)


def token_lengths(model: Any, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> list[int]:
    """The token sequences of a sample that a plan splits: an image's or a video's, and FLUX's text.

    model: its settings; transformer, vae: the configs of its components.
    """
    if model.family == "flux":
        side = 2 * 2 ** (len(vae["block_out_channels"]) - 1)
        return [(model.height // side) * (model.width // side), model.max_sequence_length]
    space = vae.get("spatial_compression_ratio") or vae["scale_factor_spatial"]
    time = vae.get("temporal_compression_ratio") or vae["scale_factor_temporal"]
    patch = transformer["patch_size"]
    t, h, w = patch if isinstance(patch, Sequence) else (transformer["patch_size_t"], patch, patch)
    frames = (model.frames - 1) // time + 1
    return [(frames // t) * (model.height // space // h) * (model.width // space // w)]
