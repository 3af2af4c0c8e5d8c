"""`fastgrpo assets CONFIG`: the model, rewards and prompts of a config: where each is, its size, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgrpo.config import Config
from fastgrpo.preflight.assets import Asset, download, find_assets, shown


def assets(config: Config, get: bool, note: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Lists what a config needs.

    Args:
        config: The config.
        get: Whether to download first what is missing and on the hub.
        note: Told what is downloaded.

    Returns:
        The table's lines, and a line for each asset that is still missing: how to get it, or why the hub refused it.
    """
    found = find_assets(config)
    refused = download(found, config.model.variant, note) if get else []
    if get:
        found = find_assets(config)
    missing = [a for a in found if a.missing]
    said = {a.hub[0]: line for a in missing if a.hub for line in refused if f": {a.hub[0]}" in line}
    return table(found), [said.get(a.hub[0], a.line) if a.hub else a.line for a in missing]


def table(found: Sequence[Asset]) -> list[str]:
    """A line for each asset: state, size, setting and source, and where it is."""
    width = max(len(a.setting) for a in found)
    lines = [
        f"{a.state:<10} {shown(a.size) if a.size else '':>9}  {a.setting:<{width}}  {a.source}"
        + (f"  ({a.where})" if a.where and a.where != a.source else "")
        for a in found
    ]
    needed = sum(a.size or 0 for a in found if a.missing)
    count = sum(a.missing for a in found)
    total = f", about {shown(needed)} to download" if needed else ""
    return [*lines, f"{len(found) - count} of {len(found)} are here or elsewhere{total}"]
