"""An error as one line for people, and its traceback in a file that the line names."""

from __future__ import annotations

import re
import tempfile
import traceback
from pathlib import Path


def described(error: BaseException, what: str, folder: Path | None = None) -> str:
    """`Type: message`, in one line, and the file that its traceback is written to: in `folder`, else a new temporary
    one."""
    said = " ".join(message(error).split())
    shown = f"{type(error).__name__}: {said:.300}".removesuffix(": ")
    try:
        return f"{shown}; traceback: {_written(error, what, folder)}"
    except OSError:
        return shown


def message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def _written(error: BaseException, what: str, folder: Path | None) -> Path:
    text = "".join(traceback.format_exception(error))
    name = re.sub(r"[^\w.-]+", "-", what)[-60:].strip("-.")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _new_file(text, name, folder)
        except OSError:
            # A run directory that cannot be written is not what the line is about.
            pass
    return _new_file(text, f"fastgrpo-{name}", None)


def _new_file(text: str, name: str, folder: Path | None) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix=f"{name}-", suffix=".txt", dir=folder, delete=False
    ) as file:
        file.write(text)
    return Path(file.name)
