"""fastgrpo: Group Relative Policy Optimization for visual generators.

    import fastgrpo
    config = fastgrpo.load_config("configs/shapes-flux.yaml", ["run.dir=runs/mine"])
    result = fastgrpo.train(config)

A trainer that is stepped from Python, and everything else below: docs/training.md. Importing this package loads
nothing else; each name is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastgrpo.commands.export import export_run as export
    from fastgrpo.commands.train import train
    from fastgrpo.config import Config, load_config
    from fastgrpo.data.prompts import Prompt
    from fastgrpo.errors import UserError
    from fastgrpo.evaluation.heldout import evaluate
    from fastgrpo.models import load_family
    from fastgrpo.rewards import Scores
    from fastgrpo.training.callbacks import Callback
    from fastgrpo.training.trainer import Trainer

# Each public name, and where it is defined.
_PUBLIC = {
    "Callback": "fastgrpo.training.callbacks:Callback",
    "Config": "fastgrpo.config:Config",
    "Prompt": "fastgrpo.data.prompts:Prompt",
    "Scores": "fastgrpo.rewards:Scores",
    "Trainer": "fastgrpo.training.trainer:Trainer",
    "UserError": "fastgrpo.errors:UserError",
    "evaluate": "fastgrpo.evaluation.heldout:evaluate",
    "export": "fastgrpo.commands.export:export_run",
    "load_config": "fastgrpo.config:load_config",
    "load_family": "fastgrpo.models:load_family",
    "train": "fastgrpo.commands.train:train",
}

__all__ = [
    "Callback",
    "Config",
    "Prompt",
    "Scores",
    "Trainer",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "load_family",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastgrpo' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
