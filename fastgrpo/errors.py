"""What a person can put right: one line each, printed without a traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message is one line that says what and how; the CLI exits with code 2."""


class ConfigError(UserError, ValueError):
    """A setting, or a file that a setting names, that cannot be used.

    Of several problems the message is the first; `problems` has them all.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems[:1])
        self.problems = problems


class MissingError(UserError):
    """A package or program that is not installed."""


class RunPausedError(UserError):
    """A run that goes on from its checkpoint once the user has mended what stopped it."""


class PreemptedError(Exception):
    """A signal ended the run, whose checkpoint is written; the CLI exits with REQUEUE."""


# The exit code that asks a scheduler to start the same command again (sysexits' EX_TEMPFAIL).
REQUEUE = 75

# The extra of pyproject.toml that brings each optional package, by its import name.
EXTRAS = {
    **dict.fromkeys(
        ("diffusers", "transformers", "peft", "safetensors", "accelerate", "ftfy", "PIL", "scipy"), "train"
    ),
    **dict.fromkeys(("matplotlib", "psutil"), "train"),
    "httpx": "rewards",
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    **dict.fromkeys(("tensorboard", "wandb"), "logging"),
    "datasets": "datasets",
    "av": "video",
    **dict.fromkeys(("rapidocr", "onnxruntime"), "rewards"),
    **dict.fromkeys(("bitsandbytes", "pynvml", "kernels"), "gpu"),
    "flash_attn": "flash-attn",
    "xformers": "xformers",
}


def missing(module: str, needed_by: str = "") -> MissingError:
    """The error for an optional package that is not installed."""
    subject = f"{needed_by}: needs" if needed_by else "this needs"
    return MissingError(f"{subject} the package '{module}'; install it with: pip install 'fastgrpo[{EXTRAS[module]}]'")


def require(module: str, needed_by: str) -> None:
    """Raises MissingError, naming the extra to install, unless `module` is installed. Imports nothing."""
    if importlib.util.find_spec(module) is None:
        raise missing(module, needed_by)


def nearest_sizes(size: int, step: int, first: int = 0) -> str:
    """`the nearest is 48` of the sizes first + step·k, k ≥ 1 (k ≥ 0 with a `first`), for one that is none of them."""
    below = first + (size - first) // step * step
    options = [n for n in (below, below + step) if n >= max(first, 1)]
    distance = min(abs(n - size) for n in options)
    best = [str(n) for n in options if abs(n - size) == distance]
    return f"the nearest {'are' if len(best) > 1 else 'is'} {' and '.join(best)}"


def nearest(word: str, options: Iterable[str]) -> str:
    """`did you mean 'x'? ` for the option closest to `word`, or an empty string."""
    import difflib

    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'? " if match else ""


def require_extra(extra: str, needed_by: str) -> None:
    """Raises UserError unless every package of an extra is installed."""
    for module in (module for module, of in EXTRAS.items() if of == extra):
        require(module, needed_by)
