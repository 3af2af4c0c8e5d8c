"""Pictures before and after: the same prompts from the same initial noise, most changed first."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.commands.report.markup import section
from fastgrpo.commands.report.run_data import STRICT, RunData, shown_columns
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

    def value(self, name: str, place: int) -> float | None:
        """A reward of the picture at `place`; None where it failed, or the evaluation did not keep it."""
        values = self.evaluation.get("values", {}).get(name, ())
        return values[place] if place < len(values) else None


def images(runs: list[RunData]) -> str:
    """The pictures of the evaluation that the summary's numbers are from; empty where there is none."""
    columns = _columns(runs)
    if not columns:
        return ""
    prompts = columns[0].evaluation["prompts"]
    order = sorted(range(len(prompts)), key=lambda place: _change(columns, place), reverse=True)
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
    note = (
        f"The first {len(prompts)} held-out prompts, chosen before training and not by hand; before and after from the "
        f"same initial noise, sampled deterministically; most changed first. {_count(columns, len(prompts))}"
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


def _names(columns: Sequence[Column]) -> list[str]:
    """The columns that say whether a picture is right where there are such, else the rewards."""
    found = shown_columns(columns[0].evaluation["rewards"])
    return [name for name in found if name.endswith(STRICT)] or found


def _change(columns: Sequence[Column], place: int) -> tuple[float, float]:
    """How much a picture changed: in what is right, then in its rewards; a gain before an equal loss."""
    strict, soft = 0.0, 0.0
    for name in shown_columns(columns[0].evaluation["rewards"]):
        before = columns[0].value(name, place)
        for column in columns[1:]:
            after = column.value(name, place)
            if before is None or after is None:
                continue
            change = abs(after - before) + (1e-6 if after > before else 0.0)
            if name.endswith(STRICT):
                strict = max(strict, change)
            else:
                soft = max(soft, change)
    return strict, soft


def _mark(column: Column, place: int) -> str:
    """Whether a picture is right, else what its rewards are."""
    parts = []
    for name in _names([column]):
        value = column.value(name, place)
        if value is None or math.isnan(value):
            continue
        if name.endswith(STRICT):
            right = value >= 0.5
            parts.append(f'<b class="{"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</b>')
        else:
            parts.append(f"{html.escape(name)} {value:.2f}")
    return " ".join(parts)


def _seen(column: Column, place: int) -> str:
    """What each reward that says so sees in a picture."""
    seen = column.evaluation.get("seen", {})
    said = [f"{html.escape(name)}: {html.escape(texts[place])}" for name, texts in seen.items() if place < len(texts)]
    return f"<p>{'<br>'.join(said)}</p>" if said else ""


def _count(columns: Sequence[Column], count: int) -> str:
    """How many became right, and how many wrong."""
    strict = [name for name in _names(columns) if name.endswith(STRICT)]
    said = []
    for column in columns[1:] if strict else ():
        pairs = [(columns[0].value(strict[0], i), column.value(strict[0], i)) for i in range(count)]
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
    tiles = read_tiles(path, count, largest, quality)
    return [f"data:image/{kind};base64," + base64.b64encode(tile).decode() for kind, tile in tiles]
