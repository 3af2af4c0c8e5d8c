"""Pieces of the page: sections, tables, numbers in words."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def section(title: str, body: str, note: str = "") -> str:
    """A section under a heading. note: HTML, what the section shows and how to read it."""
    shown = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{shown}{body}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain cells, which scrolls sideways where a screen is too narrow for it."""
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    label = html.escape(head[0] or "table", quote=True)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def arrow(before: float, after: float, style: str) -> str:
    return f'{style.format(before)} <span class="arrow">→</span> {style.format(after)}'


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def duration(seconds: float) -> str:
    """`42 s`, `5 min 40 s`, `12 h 03 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
