"""The files of a pipeline directory: what is listed is there, whole, and safetensors; what is JSON can be read.

Of weights only headers are read. What is wrong is one line that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.errors import ConfigError

LFS_POINTER = b"version https://git-lfs"
# <stem>[.<variant>][-00001-of-00002].safetensors
WEIGHTS = re.compile(r"\w+?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
# Judges images; nothing here asks it.
UNUSED = "safety_checker"


def check_index(
    path: str, index: Mapping[str, Any], trained: Sequence[str], encoders: Sequence[str], optional: Sequence[str]
) -> None:
    """Raises ConfigError for a model_index.json without a component that its family needs.

    Args:
        path: model.path, for errors.
        index: What the file says.
        trained: Components of which one at least must be there.
        encoders: Components that must not be listed as `[null, null]`.
        optional: Those of them that may be.
    """
    lacking = [name for name in ("scheduler", "vae") if not _listed(index, name)]
    if not any(_listed(index, name) for name in trained):
        lacking.append(trained[0])
    lacking += [name for name in encoders if name in index and not _listed(index, name) and name not in optional]
    if lacking:
        raise ConfigError(f"model.path: model_index.json of '{path}' has no {lacking[0]}, which this family needs")


def check_files(folder: Path, index: Mapping[str, Any], variant: str | None, without: Iterable[str] = ()) -> None:
    """Raises ConfigError for a listed component without its folder, or without whole safetensors of the variant.

    without: components that are not read from here.
    """
    for name, entry in index.items():
        part = folder / name
        if not isinstance(entry, list) or entry[0] is None or name in {UNUSED, *without}:
            continue
        if not part.is_dir():
            raise ConfigError(f"model.path: {folder / 'model_index.json'} lists {name}, and there is no folder {part}")
        # Schedulers, tokenizers and processors have configs of other names, and no weights.
        if (part / "config.json").is_file():
            check_weights(part, variant)


def check_weights(part: Path, variant: str | None) -> None:
    """Raises ConfigError unless a component's folder has whole safetensors, of the variant or of none."""
    files = {file: match["variant"] for file in part.glob("*.safetensors") if (match := WEIGHTS.fullmatch(file.name))}
    if not files:
        pickled = next(iter(sorted(part.glob("*.bin"))), None)
        raise ConfigError(
            f"model.path: there are no weights in {part}: no .safetensors file"
            if pickled is None
            else f"model.path: {pickled} is a pickle, which is never read; save the pipeline as safetensors"
        )
    chosen = variant if variant in files.values() else None
    if chosen is None and None not in files.values():
        there = ", ".join(sorted({str(v) for v in files.values()}))
        raise ConfigError(f"model.path: {part} has weights of variant {there} alone; set model.variant to it")
    for listing in part.glob("*.safetensors.index*.json"):
        for file in sorted(set(_read(listing)["weight_map"].values())):
            match = WEIGHTS.fullmatch(file)
            if match and match["variant"] == chosen and not (part / file).is_file():
                raise ConfigError(f"model.path: there is no {part / file}, which {listing.name} names; download it")
    for file in sorted(file for file, of in files.items() if of == chosen):
        check_whole(file)


def check_whole(file: Path) -> None:
    """Raises ConfigError for what is not all of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            raise ConfigError(f"model.path: {file} is a git-lfs pointer and no weights; run `git lfs pull` there")
        length = int.from_bytes(head[:8], "little")
        opened.seek(8)
        try:
            if len(head) < 8 or length > size - 8:
                raise ValueError
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"model.path: {file} is not a safetensors file, or its start alone") from None
    if 8 + length + end != size:
        raise ConfigError(
            f"model.path: {file} has {size:,} of {8 + length + end:,} bytes: it is cut short; download it again"
        )


def stored_names(part: Path) -> set[str]:
    """Returns the names of the tensors in a component's safetensors, of every variant."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in part.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


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
    if data.startswith(LFS_POINTER):
        return "is a git-lfs pointer, not the file; run `git lfs pull` there"
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON that can be read; copy or download it again"
    return ""


def variant_name(file: str, variant: str | None) -> str:
    """A file's name in a variant: model.safetensors, model.fp16.safetensors."""
    return file if variant is None else file.replace(".", f".{variant}.", 1)


def _listed(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and entry[0] is not None


def _read(listing: Path) -> dict[str, Any]:
    try:
        read = json.loads(listing.read_text(encoding="utf-8"))
        return {"weight_map": {str(key): str(file) for key, file in read["weight_map"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"model.path: {listing} is no list of weights; download it again") from None
