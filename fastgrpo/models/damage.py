"""What is wrong with the JSON files of a pipeline's directory; weights are looked at by weight_files.py."""

from __future__ import annotations

import json
from pathlib import Path

POINTER = b"version https://git-lfs"


def damaged_files(folder: Path) -> list[str]:
    """Returns a line for each JSON file of a pipeline and its components that is no JSON, or a pointer of git-LFS."""
    found = []
    for path in sorted(p for p in (*folder.glob("*/*.json"), folder / "model_index.json") if p.is_file()):
        try:
            said = _of_json(path)
        except OSError as error:
            said = error.strerror or "cannot be read"
        if said:
            found.append(f"model.path: {path}: {said}")
    return found


def _of_json(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(POINTER):
        return "is a pointer of git-LFS, not the file; fetch it: git lfs pull"
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON that can be read; copy or download it again"
    return ""
