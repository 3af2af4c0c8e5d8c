"""Pictures before and after: the same prompts from the same initial noise, most changed first."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from fastgrpo.commands.report.markup import section
from fastgrpo.commands.report.run_data import RunData
from fastgrpo.errors import UserError
from fastgrpo.evaluation.compare import STRICT, marks, most_changed
from fastgrpo.observe.media import read_tiles

# Bytes of all pictures of a page, as base64: with its charts the page stays under 1 MB.
BUDGET = 600_000

# Largest side and quality (None: lossless) of a picture, tried in turn until all fit the budget.
SIZES: tuple[tuple[int, int | None], ...] = ((256, None), (256, 80), (192, 70), (128, 60), (96, 50))


@dataclass(frozen=True)
class Column:
    """What one model drew. label: before, after, or the run's name."""

    label: str
    evaluation: dict[str, Any]

    @property
    def sheet(self) -> Path:
        return self.evaluation["folder"] / self.evaluation.get("video", self.evaluation["grid"])

    @property
    def values(self) -> dict[str, list[float | None]]:
        """Of each column, by picture of the sheet; None where it failed, empty where values were not kept."""
        values, shown = self.evaluation.get("values", {}), self.evaluation.get("shown")
        return {name: [of[i] for i in shown] if shown else of for name, of in values.items()}


def images(runs: list[RunData]) -> str:
    """The pictures of the evaluation that the summary's numbers are from; empty where there is none."""
    columns = _columns(runs)
    if not columns:
        return ""
    prompts = columns[0].evaluation["prompts"]
    order = most_changed(columns[0].values, [c.values for c in columns[1:]], range(len(prompts)))
    tiles, shown = _within_budget(columns, order)
    cards = []
    for place in order[:shown]:
        caption = html.escape(prompts[place])
        pictures = "".join(
            f'<div><img alt="{html.escape(c.label)}: {caption}" src="{tiles[i][place]}" loading="lazy">'
            f"<p>{html.escape(c.label)} {_mark(c, place)}</p>{_seen(c, place)}</div>"
            for i, c in enumerate(columns)
        )
        cards.append(f'<figure><figcaption>{caption}</figcaption><div class="pair">{pictures}</div></figure>')
    noun = runs[0].noun
    which = f"The first {len(prompts)} held-out prompts"
    first = list(range(len(prompts)))
    if columns[0].evaluation.get("shown", first) != first:
        which = (
            f"{len(prompts)} of {columns[0].evaluation['images']} held-out prompts, with as large a share of gains, "
            "losses and unchanged ones as among all, the first of each"
        )
    note = (
        f"{which}; before and after from the same initial noise, sampled deterministically; most changed first. "
        f"{_count(columns, len(prompts))}"
    )
    if shown < len(prompts):
        note += f" {len(prompts) - shown} {noun} that changed least are left out, to keep this page small."
    return section(noun.capitalize(), f'<div class="pairs">{"".join(cards)}</div>', note)


def _columns(runs: list[RunData]) -> list[Column]:
    """The base model's evaluation, then each run's last one of the same prompts."""
    shown = [(run, run.closing if len(run.closing) > 1 else run.evaluations) for run in runs]
    shown = [(run, evaluations) for run, evaluations in shown if evaluations]
    if not shown:
        return []
    base = shown[0][1][0]
    columns = [Column("before", base)]
    for run, evaluations in shown:
        last = evaluations[-1]
        if last["iteration"] != base["iteration"] and last["prompts"] == base["prompts"]:
            columns.append(Column("after" if len(shown) == 1 else run.name, last))
    return columns


def _mark(column: Column, place: int) -> str:
    """Whether a picture is right, else what its rewards are."""
    parts = []
    for name, value in marks(column.values, place):
        if name.endswith(STRICT):
            parts.append('<b class="right">✓ right</b>' if value >= 0.5 else '<b class="wrong">✗ wrong</b>')
        else:
            parts.append(f"{html.escape(name)} {value:.2f}")
    return " ".join(parts)


def _seen(column: Column, place: int) -> str:
    """What each reward that says so sees in a picture."""
    seen = column.evaluation.get("seen", {})
    found = {name: texts[place] for name, texts in seen.items() if place < len(texts) and texts[place]}
    said = [f"{html.escape(name)}: {html.escape(text)}" for name, text in found.items()]
    return f"<p>{'<br>'.join(said)}</p>" if said else ""


def _count(columns: Sequence[Column], count: int) -> str:
    """How many became right, and how many wrong."""
    strict = next((name for name in columns[0].values if name.endswith(STRICT)), None)
    if strict is None:
        return ""
    said = []
    for column in columns[1:]:
        pairs = list(zip(columns[0].values[strict][:count], column.values.get(strict, ())[:count], strict=False))
        known = [(old, new) for old, new in pairs if old is not None and new is not None]
        gained, lost = sum(new > old for old, new in known), sum(new < old for old, new in known)
        name = "" if column.label == "after" else f"{html.escape(column.label)}: "
        if known:
            said.append(f"{name}{gained} became right, {lost} became wrong, {len(known) - gained - lost} stayed.")
    return " ".join(said)


def _within_budget(columns: Sequence[Column], order: Sequence[int]) -> tuple[list[list[str]], int]:
    """The pictures of each column as data URLs, as large as the budget allows, and how many rows of them fit it."""
    tiles: list[list[str]] = []
    for largest, quality in SIZES:
        tiles = [grid_tiles(c.sheet, len(order), largest, quality) for c in columns]
        if sum(len(tile) for row in tiles for tile in row) <= BUDGET:
            return tiles, len(order)
    used, shown = 0, 0
    for place in order:
        used += sum(len(row[place]) for row in tiles)
        if used > BUDGET:
            break
        shown += 1
    return tiles, shown


def grid_tiles(path: Path, count: int, largest: int = 256, quality: int | None = None) -> list[str]:
    """The `count` pictures of a sheet of `fastgrpo.evaluate`, still or moving, as data URLs.

    quality: of a lossy WebP; None: lossless, PNG where it is still.
    """
    try:
        tiles = read_tiles(path, count, largest, quality)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture; remove it and its evaluation to go on") from None
    return [f"data:image/{kind};base64," + base64.b64encode(tile).decode() for kind, tile in tiles]
