"""A run, or several side by side, as one self-contained HTML page: `fastgrpo report RUN [RUN…]`."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

from fastgrpo import __version__
from fastgrpo.commands.report import sections
from fastgrpo.commands.report.pictures import images
from fastgrpo.commands.report.run_data import read_run
from fastgrpo.errors import UserError


def write_report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one or several run directories, to `report.html` in the first unless `out` says where.

    Raises UserError for a directory without a run, or without an iteration.
    """
    directories = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    path = Path(out) if out is not None else directories[0] / "report.html"
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the HTML file")
    text = report_page(directories)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path


def report_page(runs: Sequence[Path], live: str = "") -> str:
    """The page of one or several run directories. live: HTML that stands above it, of a page that is made again."""
    data = [read_run(directory) for directory in runs]
    parts = [
        sections.summary(data),
        images(data),
        sections.learning(data),
        sections.categories(data),
        sections.watched(data),
        sections.stability(data),
        sections.time(data),
        sections.config(data),
    ]
    return page(" · ".join(run.name for run in data), "\n".join(filter(None, parts)), live)


def page(title: str, body: str, live: str = "") -> str:
    """A whole page around the sections of a report."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=body, live=live, version=__version__)
