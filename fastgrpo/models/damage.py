"""What is wrong with the files of a pipeline's directory, as far as it can be seen without loading them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"


def damaged_files(folder: Path) -> list[str]:
    """A line for each file of a pipeline's components that cannot be what it should be: pointers of git-LFS, files that
    are cut short, JSON that cannot be read, shards that an index names and that are not there.

    Files beside the components, and variants (model.fp16.safetensors), are not read by a pipeline.
    """
    found = []
    files = [p for p in (*folder.glob("*/*"), folder / "model_index.json") if p.is_file()]
    for path in sorted(p for p in files if p.suffix == ".json" or (p.suffix == ".safetensors" and "." not in p.stem)):
        try:
            said = _of_weights(path) if path.suffix == ".safetensors" else _of_json(path)
        except OSError as error:
            said = error.strerror or "cannot be read"
        if said:
            found.append(f"model.path: {path}: {said}")
    return found


def _of_weights(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start + file.read(len(POINTER) - 8) == POINTER:
            return "is a pointer of git-LFS, not the weights; fetch them: git lfs pull"
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
            return "is cut short; copy or download it again"
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "its header cannot be read; copy or download it again"
    if 8 + length + end != size:
        return f"has {size:,} bytes, and its header says {8 + length + end:,}; copy or download it again"
    return ""


def _of_json(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(POINTER):
        return "is a pointer of git-LFS, not the file; fetch it: git lfs pull"
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON that can be read; copy or download it again"
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if path.name.endswith(".index.json") and isinstance(shards, dict):
        gone = [name for name in dict.fromkeys(map(str, shards.values())) if not (path.parent / name).is_file()]
        if gone:
            return f"names {len(gone)} files that are not there, such as {gone[0]}; download them"
    return ""
