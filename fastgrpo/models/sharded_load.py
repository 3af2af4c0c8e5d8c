"""Weights read from safetensors shard by shard: a component is built without values, sharded, and each rank reads its
rows of each tensor. No rank ever holds the whole of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.distributed.shards import place
from fastgrpo.errors import ConfigError
from fastgrpo.models.weight_files import check_weights, variant_name

WEIGHTS = "diffusion_pytorch_model.safetensors"


def empty_component(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The diffusers model of a config.json: parameters on the meta device, buffers with their values."""
    import accelerate
    import diffusers

    with accelerate.init_empty_weights(include_buffers=False):
        return getattr(diffusers, config["_class_name"]).from_config(config).to(dtype)


def weight_files(path: str, component: str, variant: str | None = None) -> dict[str, Path]:
    """Which file of a pipeline (a directory, or a hub id, which is downloaded) holds each tensor of a component.

    Raises ConfigError where there are no safetensors.
    """
    from safetensors import safe_open

    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = [f"{component}/{variant_name(WEIGHTS, variant)}*", f"{component}/*.json"]
        wanted.append(f"{component}/*{f'.{variant}' if variant else ''}-*-of-*.safetensors")
        folder = Path(snapshot_download(path, allow_patterns=wanted))
    if (folder / component).is_dir():
        check_weights(folder / component, variant)
    index = folder / component / f"{WEIGHTS}.{variant_name('index.json', variant)}"
    if index.is_file():
        return {name: index.parent / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / component / variant_name(WEIGHTS, variant)
    if not single.is_file():
        raise ConfigError(f"parallel.load: there is no {single}; convert its weights to it, or set this to whole")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


@torch.no_grad()
def load_shards(module: nn.Module, files: Mapping[str, Path], device: torch.device) -> None:
    """Gives a sharded module on the meta device this rank's shards of its weights, in the dtypes that it has.

    Raises ConfigError for a tensor that no file has.
    """
    from safetensors import safe_open

    opened: dict[Path, Any] = {}
    found: dict[str, Tensor] = {}
    for name, target in module.state_dict().items():
        if name not in files:
            raise ConfigError(f"parallel.load: the files of model.path have no '{name}'; set it to whole")
        if files[name] not in opened:
            opened[files[name]] = safe_open(files[name], "pt")
        found[name] = _shard(opened[files[name]].get_slice(name), target, device)
    module.load_state_dict(found, assign=True)


def _shard(stored: Any, target: Tensor, device: torch.device) -> Tensor:
    """What of a stored tensor this rank holds, as `target` is sharded."""
    if not isinstance(target, DTensor):
        return stored[...].to(device, target.dtype, copy=True)
    mesh, placements = target.device_mesh, target.placements
    shape, offset = place(target)
    rows = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    part = stored[rows] if all(shape) else torch.empty(shape)
    # A copy: what is read is a view of the mapped file.
    local = part.contiguous().to(device, target.dtype, copy=True)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=target.shape, stride=target.stride())
