"""A loaded family at another size or guidance: for an evaluation, or an objective that trains without guidance."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

from fastgrpo.config import Model
from fastgrpo.errors import ConfigError
from fastgrpo.models.embeddings import EmbeddingCache, encoded_size
from fastgrpo.models.placement import PlacedPipeline
from fastgrpo.models.protocol import ModelFamily

FamilyType = TypeVar("FamilyType", bound=ModelFamily)


def resized(family: FamilyType, config: Model, section: str = "model") -> FamilyType:
    """Returns a family with the same weights at another size or guidance; it shares all that does not depend on these.

    Args:
        family: The family, loaded.
        config: The model section to follow.
        section: Where its sizes are set, for errors.

    Raises:
        ConfigError: For a size that the family cannot make.
    """
    if config == family.config:
        return family
    check_section(type(family), section, config, family.component_configs)
    # Not `encoder` and the like, which belong to the pipeline and not to a size.
    kept = {name for name, value in vars(PlacedPipeline).items() if isinstance(value, cached_property)}
    other = copy.copy(family)
    for name in vars(family).keys() - kept:
        if isinstance(getattr(type(family), name, None), cached_property):
            del vars(other)[name]
    other.config = config
    if family.takes_image:
        # Its encodings are those of a size.
        other.embeddings = EmbeddingCache(family.embeddings.directory, encoded_size(config))
    return other


def check_section(
    cls: type[ModelFamily], section: str, config: Model, parts: Mapping[str, Mapping[str, Any]]
) -> None:  # fmt: skip
    """`ModelFamily.check` of sizes that another section of the config than `model` sets; its errors name that one."""
    try:
        cls.check(config, parts)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.", f"{section}.", 1)) from None
