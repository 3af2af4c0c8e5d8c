"""Sharded tensors on disk: a safetensors file for each rank, and an index in JSON that says which file holds which part
of a tensor. Any number of ranks reads what any other number wrote; nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.distributed.shards import local, place

INDEX = "index.json"

# The names that the safetensors format has for what a checkpoint holds.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor: `data` begins at `offset` of a whole of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, by names such as `model/transformer.proj_out.weight`."""
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def part_of(name: str, tensor: Tensor) -> Part:
    """This rank's part of a tensor; it shares its memory."""
    return Part(name, tuple(tensor.shape), place(tensor)[1], local(tensor))


def write_shard(path: Path, parts: Iterable[Part]) -> None:
    """Writes a safetensors file, one tensor in host memory at a time, and waits until the disk has it.

    Its metadata names the parts' places, and the floating-point tensors that hold a number that is not finite.
    """
    # Large elements first: each stands at a multiple of its size.
    parts = sorted(parts, key=lambda part: -part.data.element_size())
    header: dict[str, Any] = {}
    end = 0
    for part in parts:
        begin, end = end, end + part.data.numel() * part.data.element_size()
        header[part.name] = {
            "dtype": DTYPES[part.data.dtype], "shape": list(part.data.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    places = {part.name: [part.shape, part.offset] for part in parts}
    not_finite = [p.name for p in parts if p.data.is_floating_point() and not bool(p.data.isfinite().all())]
    header["__metadata__"] = {"places": json.dumps(places), "not_finite": json.dumps(not_finite)}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            data = part.data.detach().cpu().contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: Path) -> list[str]:
    """Writes index.json over a directory's shards; the names of the tensors that are not finite."""
    from safetensors import safe_open

    index: dict[str, Any] = {}
    not_finite: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            not_finite.update(json.loads(metadata["not_finite"]))
            for name, (shape, offset) in json.loads(metadata["places"]).items():
                entry = index.setdefault(name, {"shape": shape, "parts": []})
                size = file.get_slice(name).get_shape()
                entry["parts"].append({"file": path.name, "offset": offset, "size": size})
    (directory / INDEX).write_text(json.dumps(index))
    return sorted(not_finite)


@torch.no_grad()
def read_shards(directory: Path, tensors: Mapping[str, Any]) -> None:
    """Fills this rank's parts of (nested) tensors in place, whatever ranks wrote them.

    Raises ValueError, naming the tensor, for one that is not there, or is there in another shape.
    """
    from safetensors import safe_open

    index = json.loads((directory / INDEX).read_text())
    opened: dict[str, Any] = {}
    for name, target in flatten(tensors):
        if target.numel() == 0:
            continue
        entry = index.get(name)
        if entry is None:
            raise ValueError(f"it holds no '{name}'")
        if tuple(entry["shape"]) != tuple(target.shape):
            raise ValueError(f"'{name}' is {entry['shape']} in it, and should be {list(target.shape)}")
        shape, offset = place(target)
        destination, filled = local(target), 0
        for stored in entry["parts"]:
            begin = [max(a, b) for a, b in zip(offset, stored["offset"], strict=True)]
            ends = zip(offset, shape, stored["offset"], stored["size"], strict=True)
            size = [min(a + n, b + m) - first for first, (a, n, b, m) in zip(begin, ends, strict=True)]
            if any(n <= 0 for n in size):
                continue
            if stored["file"] not in opened:
                opened[stored["file"]] = safe_open(directory / stored["file"], "pt")
            file = opened[stored["file"]]
            whole = size == stored["size"]
            data = file.get_tensor(name) if whole else file.get_slice(name)[_window(begin, size, stored["offset"])]
            destination[_window(begin, size, offset)].copy_(data)
            filled += data.numel()
        if filled != destination.numel():
            raise ValueError(f"'{name}' is not whole in it")


def _window(begin: Iterable[int], size: Iterable[int], offset: Iterable[int]) -> tuple[slice, ...]:
    """The slices of a part that begins at `offset`, for what begins at `begin` of the whole."""
    return tuple(slice(b - o, b - o + n) for b, n, o in zip(begin, size, offset, strict=True))
