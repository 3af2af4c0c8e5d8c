"""All that can be known of a run without its weights: every problem at once, and what is likely not meant.

`fastgrpo train CONFIG --check` prints it; a run tells the remarks when it starts.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastgrpo.algorithms.objectives import forward_objective
from fastgrpo.algorithms.schedule import check_sampler
from fastgrpo.config import Config, Model
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.distributed.adamw_8bit import check_optimizer
from fastgrpo.distributed.world import check_world
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models import ModelFamily, check_guidance, family_class
from fastgrpo.models.architectures import architecture, known
from fastgrpo.models.attention import check_backend
from fastgrpo.models.context import check_context
from fastgrpo.models.loading import check_encoders, one_line, read_configs, resolve_path
from fastgrpo.models.nf4 import check_quantization
from fastgrpo.models.resized import check_section
from fastgrpo.models.weight_files import check_files, damaged_files
from fastgrpo.preflight.assets import find_assets
from fastgrpo.preflight.remarks import check_pictures, remarks
from fastgrpo.rewards import load_reward

Result = TypeVar("Result")
# GPUs of a node, where only the number of ranks is known.
NODE = 8


@dataclass
class Preflight:
    """What was found. problems: each would end the run; missing: what the run would download, or could not; remarks:
    each is likely not meant; prompts: by source."""

    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, or None where it raises UserError, whose problems are kept."""
        try:
            return work()
        except UserError as error:
            found = getattr(error, "problems", None) or (str(error),)
            self.problems += [problem for problem in found if problem not in self.problems]
        return None


def preflight(config: Config, ranks: int = 1) -> Preflight:
    """Checks a run of `ranks` ranks; loads no weights, downloads nothing and writes nothing."""
    found = Preflight()
    kind, cls = "", found.attempt(lambda: family_class(config.model.family))
    if cls is not None:
        found.attempt(lambda: check_sampler(config.rollout.sampler, cls.paradigm, cls.name))
        kind, parts = found.attempt(lambda: _described(cls, config.model, found)) or ("", {})
        if parts:
            found.attempt(lambda: cls.check(config.model, parts))
        if parts and config.evaluated_model != config.model:
            found.attempt(lambda: check_section(cls, "eval", config.evaluated_model, parts))
        if parts and config.parallel.context > 1:
            found.attempt(lambda: check_context(config, cls, parts, "cuda" if torch.cuda.is_available() else "cpu"))
    found.attempt(lambda: forward_objective(config))
    found.attempt(lambda: check_quantization(config.model))
    if cls is not None:
        found.attempt(lambda: check_guidance(config.model))
    found.attempt(lambda: check_backend(config.model.attention_backend, config.parallel.context))
    found.attempt(lambda: check_optimizer(config.update.optimizer))
    found.attempt(lambda: check_world(config, ranks, min(ranks, NODE)))
    found.attempt(lambda: _check_groups(config, ranks))
    for spec in config.scored:
        found.attempt(lambda spec=spec: load_reward(spec))
    pictured = kind if cls is not None and kind in cls.image_pipelines else ""
    for source in dict.fromkeys(filter(None, (config.prompts.train, config.prompts.heldout))):
        prompts = found.attempt(lambda source=source: load_prompts(source))
        if prompts is not None:
            found.prompts[source] = prompts
            found.attempt(lambda source=source, prompts=prompts: check_pictures(source, prompts, pictured))
    _tell_missing(config, found)
    if not found.problems and cls is not None:
        found.remarks += remarks(config, cls, found.prompts)
    return found


def _tell_missing(config: Config, found: Preflight) -> None:
    """What is not here, each once: in place of a problem that says no more than that it is not there."""
    for asset in find_assets(config):
        if not asset.missing:
            continue
        own = [p for p in found.problems if f"there is nothing at {asset.source}" in p]
        if own and asset.note != f"there is nothing at {asset.source}":
            found.problems[found.problems.index(own[0])] = asset.line
        elif not any(asset.source in p for p in found.problems):
            found.missing.append(asset.line)


def _described(cls: type[ModelFamily], model: Model, found: Preflight) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
    """The class of the pipeline at model.path and its components' configs, as far as they are on this machine."""
    if model.path in known():
        spec = architecture(model.path)
        kind, parts = spec["pipeline"], {name: _completed(*entry) for name, entry in spec["parts"].items()}
        if kind not in cls.pipeline_classes:
            raise ConfigError(f"model.path: '{model.path}' is a {kind}, not a {' or '.join(cls.pipeline_classes)}")
    else:
        folder = Path(resolve_path(model.path))
        if not folder.is_dir() and model.path.count("/") == 1:
            found.remarks.append(f"model.path: '{model.path}' is no directory here, and as a hub id it was not checked")
            return "", {}
        if not folder.is_dir():
            raise ConfigError(f"model.path: there is no directory '{model.path}'")
        if damaged := damaged_files(folder):
            raise ConfigError(*damaged)
        parts = dict(read_configs(cls, model))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index["_class_name"]
        found.attempt(lambda: _check_weights(cls, model, folder, index))
    return kind, parts


def _check_weights(cls: type[ModelFamily], model: Model, folder: Path, index: Mapping[str, Any]) -> None:
    """Raises ConfigError for files that are not there or not whole, or an encoder of other weights than they hold."""
    check_files(folder, index, model.variant)
    with one_line(model, cls.pipeline_classes):
        check_encoders(model.path, folder, index, model.variant)


def _completed(library: str, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A component's settings with its class, and what the class has where they are silent."""
    kind = getattr(importlib.import_module(library), name)
    signature = inspect.signature(kind.__init__).parameters if library == "diffusers" else {}
    defaults = {key: entry.default for key, entry in signature.items() if entry.default is not entry.empty}
    return {**defaults, **settings, "_class_name": name}


def _check_groups(config: Config, ranks: int) -> None:
    """Raises ConfigError where best-of-N's groups would be divided among ranks."""
    roll, shares = config.rollout, max(1, ranks // config.parallel.context) * config.update.optimizer_steps
    if roll.best_of is not None and roll.prompts_per_iteration % shares:
        raise ConfigError(
            f"rollout.best_of: groups of {roll.best_of} stay whole, and {roll.prompts_per_iteration} prompts an "
            f"iteration do not divide over {shares} (ranks × update.optimizer_steps)"
        )
