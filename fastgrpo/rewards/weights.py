"""Weights of reward models: found, read from safetensors alone, and loaded whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from fastgrpo.errors import ConfigError

HUB_ID = r"[\w.-]+/[\w.-]+"
PICKLED = {".pt", ".pth", ".bin", ".ckpt"}
Module = TypeVar("Module", bound=nn.Module)


def resolve(path: str, weights: bool = True) -> Path:
    """Where a model is: shapes:<name> (shipped), a file or directory, or a hub id, which is downloaded (without
    `weights`, its small files alone).

    Raises ConfigError where there is nothing, and for a pickle archive, which `fastgrpo convert-reward` reads.
    """
    if path.startswith("shapes:"):
        local = Path(__file__).parents[1] / "shapes" / "weights" / path.removeprefix("shapes:")
    else:
        local = Path(path)
    if local.suffix in PICKLED:
        raise ConfigError(f"path: {path} may be a pickle archive; convert it once: fastgrpo convert-reward {path} OUT")
    if local.exists():
        return local
    file = local.suffix == ".safetensors" or local.parent.is_dir()
    if path.startswith("shapes:") or not re.fullmatch(HUB_ID, path) or file:
        raise ConfigError(f"path: there is nothing at {path}")
    from huggingface_hub import snapshot_download

    try:
        kinds = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(path, allow_patterns=kinds))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"path: there is no {path} here, and the hub did not give it: {reason}") from None


def check_exists(path: str) -> None:
    """Raises ConfigError for a path that can be seen to be wrong without a download."""
    if path.startswith("shapes:") or Path(path).suffix in {*PICKLED, ".safetensors"} or not re.fullmatch(HUB_ID, path):
        resolve(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all those in a directory. Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"path: {path} holds no .safetensors; convert its weights: fastgrpo convert-reward FILE OUT")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"path: {file} is not a readable safetensors file: {error}") from None
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"path: {path} cannot be read: {error}") from None


def load_strict(module: Module, state: Mapping[str, Tensor], where: object, ignore: Iterable[str] = ()) -> Module:
    """`module` with exactly these weights, in eval mode and frozen.

    Raises ConfigError naming the missing, unexpected and misshapen keys; patterns of `ignore` may be left over.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(k for k in state.keys() - wanted.keys() if not any(re.search(pattern, k) for pattern in ignore))
    shapes = [
        f"{k} {list(state[k].shape)} for {list(wanted[k].shape)}"
        for k in sorted(wanted.keys() & state.keys())
        if state[k].shape != wanted[k].shape
    ]
    problems = {"missing": missing, "unexpected": extra, "of another shape": shapes}
    found = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise ConfigError(f"path: {where} does not fit the model: {'; '.join(found)}")
    module.load_state_dict({k: state[k] for k in wanted})
    return module.eval().requires_grad_(False)


def load_pretrained(factory: Any, path: Path) -> Any:
    """A transformers model from its directory, whole: missing or unexpected keys raise ConfigError."""
    import torch

    try:
        model, info = factory.from_pretrained(
            path, output_loading_info=True, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"path: {path} cannot be loaded: {reason}") from None
    found = [
        f"{len(keys)} {what} ({_few(sorted(map(str, keys)))})"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (keys := info[what])
    ]
    if found:
        raise ConfigError(f"path: {path} does not fit the model: {'; '.join(found).replace('_keys', '')}")
    return model.eval().requires_grad_(False)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a directory or hub id. Raises ConfigError."""
    from transformers import AutoTokenizer

    where = resolve(path, weights=False)
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"processor: {path} has no tokenizer: {reason}") from None


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")
