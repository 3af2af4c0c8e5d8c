"""Paths as people type them into a config, where no shell has seen them."""

from __future__ import annotations

import os


def expand_user(path: str) -> str:
    """A path with `~` and `~name` as the home directories that a shell would make of them."""
    return os.path.expanduser(path) if path.startswith("~") else path
