"""A prompt source: `animals:<number>`."""

from __future__ import annotations

from fastgrpo.data import Prompt
from fastgrpo.errors import ConfigError

ANIMALS = ("cat", "dog", "horse", "owl", "fox", "whale")


def animals(spec: str) -> list[Prompt]:
    """The prompts of `animals:<spec>`: that many animals."""
    if not spec.isdigit() or not 1 <= int(spec) <= len(ANIMALS):
        raise ConfigError(f"animals:{spec}: should be a number from 1 to {len(ANIMALS)}")
    return [Prompt(f"a {name}", metadata={"animal": name}) for name in ANIMALS[: int(spec)]]
