"""Real pipelines without their weights: what `fastgrpo plan` builds, from a directory or from the configurations here.

Each <hub id with -- for />.json names a pipeline class and its components' classes and settings; `from` says where the
figures come from. A test compares their sizes with the published ones.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgrpo.config import Model
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.errors import ConfigError
from fastgrpo.models import ModelFamily, family_class
from fastgrpo.models.loading import resolve_path

FOLDER = Path(__file__).parent


def known() -> list[str]:
    """Hub ids whose configuration is here."""
    return sorted(path.stem.replace("--", "/") for path in FOLDER.glob("*.json"))


def architecture(path: str) -> dict[str, Any]:
    """`pipeline`, `parts` and `from` of a hub id or a pipeline directory. Raises ConfigError."""
    bundled = FOLDER / f"{path.replace('/', '--')}.json"
    if bundled.is_file():
        return json.loads(bundled.read_text())
    folder = Path(resolve_path(path))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"model.path: a plan needs the configuration of '{path}': a pipeline directory, or one of "
            f"{', '.join(known())}"
        )
    index = json.loads((folder / "model_index.json").read_text())
    parts = {}
    for name, value in index.items():
        files = [folder / name / file for file in ("config.json", "scheduler_config.json")]
        file = next((f for f in files if f.is_file()), None)
        if isinstance(value, list) and value[0] in ("diffusers", "transformers") and file is not None:
            parts[name] = [*value, json.loads(file.read_text())]
    extras = {name: value for name, value in index.items() if not isinstance(value, list) and not name.startswith("_")}
    return {"pipeline": index["_class_name"], "parts": parts, "settings": extras, "from": str(folder)}


META = torch.device("meta")


def build_family(
    config: Model, device: torch.device = META, tokenizers: Mapping[str, Any] | None = None
) -> ModelFamily:
    """The family with its whole pipeline in the dtypes that training has it: on the meta device, or with random weights
    on another. tokenizers: of its components, else there are none."""
    import diffusers

    cls, spec = family_class(config.family), architecture(config.path)
    if spec["pipeline"] not in cls.pipeline_classes:
        raise ConfigError(
            f"model.path: '{config.path}' is a {spec['pipeline']}, not a {' or '.join(cls.pipeline_classes)}"
        )
    pipeline_class: Any = getattr(diffusers, spec["pipeline"])
    expected = pipeline_class._get_signature_keys(pipeline_class)[0]
    if tokenizers is None and cls.reads_tokenizer:
        tokenizers = cls.word_tokenizers(config.max_sequence_length)
    parts: dict[str, Any] = {**dict.fromkeys(expected), **(tokenizers or {})}
    compute = DTYPES[config.dtype]
    for name, (library, kind, settings) in spec["parts"].items():
        trained = name in cls.trained and not config.lora
        dtype = torch.float32 if trained else compute
        parts[name] = _component(library, kind, settings, device, dtype)
        if isinstance(parts[name], nn.Module):
            parts[name].to(dtype)
    pipeline = pipeline_class(**parts, **spec.get("settings", {}))
    return cls(pipeline, config, device)


def _component(library: str, kind: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    cls: Any = getattr(importlib.import_module(library), kind)
    plain = {name: value for name, value in settings.items() if not name.startswith("_")}
    if kind.endswith("Scheduler"):
        return cls.from_config(plain)
    before = torch.get_default_dtype()
    # A real model's weights are never there in a wider dtype than they need.
    torch.set_default_dtype(torch.float32 if device == META else dtype)
    try:
        with device:
            return cls(cls.config_class(**plain)) if library == "transformers" else cls.from_config(plain)
    finally:
        torch.set_default_dtype(before)
