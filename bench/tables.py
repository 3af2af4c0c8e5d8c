"""What the benchmarks keep: one CSV a device with one row a key, tables between marks of a document, git revisions."""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgrpo.errors import UserError, nearest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "bench" / "data"

Row = dict[str, Any]


def device_slug() -> str:
    """A file name for this device: the GPU's, or the processor's architecture and threads."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def read(table: Path) -> list[Row]:
    """Rows of a table, of text; none if there is no table yet."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def upsert(
    table: Path, rows: list[Row], key: Sequence[str], columns: Sequence[str], series: Sequence[str] = ()
) -> None:
    """Write rows into a table, each over the row of its key, in order of keys.

    series: the columns that name a series. Earlier rows of the series in `rows` are dropped: another run has others.
    """
    new = {tuple(str(row[k]) for k in series) for row in rows} if series else set()
    earlier = [row for row in read(table) if tuple(row[k] for k in series) not in new]
    kept = {tuple(str(row[k]) for k in key): row for row in [*earlier, *rows]}
    table.parent.mkdir(exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        # Rows from before a column was there lack it.
        writer.writerows([kept[k].get(column, "") for column in columns] for k in sorted(kept))


def between(document: Path, marks: tuple[str, str], text: str) -> str:
    """A document with `text` between its marks."""
    before, rest = document.read_text(encoding="utf-8").split(marks[0])
    _, after = rest.split(marks[1])
    return f"{before}{marks[0]}\n{text}\n{marks[1]}{after}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, a line a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def show(title: str, rows: list[Row], columns: Sequence[str], left: Sequence[str] = ()) -> None:
    """A table on the terminal; the columns `left` are text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def chosen(where: str, what: str, names: Sequence[str] | None, known: Any) -> list[str]:
    """The names that were asked for, or all that are known. Raises UserError, with the nearest match."""
    for name in names or ():
        if name not in known:
            raise UserError(f"{where}: unknown {what} {name!r}; {nearest(name, known)}one of: {', '.join(known)}")
    return list(names or known)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def revision() -> str:
    """The commit that is checked out, short; "none" in a copy without a git repository."""
    return git("rev-parse", "--short", "HEAD").strip() if (ROOT / ".git").exists() else "none"


def unpack(where: str, base: str, paths: Sequence[str], folder: Path) -> None:
    """Files of a git ref, into a folder. Raises UserError for a ref that does not have them."""
    archive = subprocess.run(["git", "archive", base, *paths], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise UserError(f"{where}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
