"""Rewards that people write, a class or a function of a module or of a file: found, made and checked; callbacks too."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastgrpo.errors import EXTRAS, ConfigError, missing, nearest
from fastgrpo.observe.tracebacks import described
from fastgrpo.rewards.base import FunctionReward, Reward

Made = TypeVar("Made")

TAKES = "(samples, prompts, fps)"


def find(target: str, setting: str = "rewards") -> Any:
    """What `module:name` or `file.py:name` names, in a setting. Modules of the working directory are found, after
    installed ones.

    Raises ConfigError where there is no such thing or its code fails; UserError where it needs an extra of ours.
    """
    where, _, name = target.rpartition(":")
    try:
        module = _of_file(Path(where).expanduser()) if where.endswith(".py") else _of_name(where)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name in EXTRAS:
            raise missing(error.name, f"{setting}: '{target}'") from None
        raise ConfigError(f"'{where}' cannot be imported: {described(error, target)}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"'{where}' cannot be imported: {described(error, target)}") from None
    if not name or not hasattr(module, name):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        known = f"{nearest(name, own)}(it defines: {', '.join(own) or 'nothing'})"
        raise ConfigError(f"'{name}' is not in {getattr(module, '__file__', None) or where}; {known}")
    return getattr(module, name)


def made(base: type[Made], target: str, setting: str) -> Made:
    """A new object of the class of `base` that `module:Class` names in a setting. Raises ConfigError, naming what is
    wrong; UserError where it needs an extra of ours."""
    # Of a file the module's name, by which a checkpoint keeps states, would depend on where it lies.
    if ":" not in target or ".py:" in target:
        raise ConfigError(f"{setting}: '{target}' is not module:Class, such as my_{setting}:My{base.__name__}")
    try:
        kind = find(target, setting)
    except ConfigError as error:
        raise ConfigError(f"{setting}: '{target}' cannot be imported: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(f"{setting}: '{target}' is not a subclass of {base.__module__}.{base.__qualname__}")
    try:
        return kind()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{setting}: '{target}' cannot be made without arguments: {described(error, target)}"
        ) from None


def _of_name(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        # `python -m fastgrpo` has it; the command `fastgrpo` has its own folder instead.
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigError(
            f"there is no module '{error.name}' in {folder} or among what is installed; write module:Class, or "
            "file.py:Class with the file's path"
        ) from None


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]).strip()
        raise ConfigError(f"there is no file {path}{'; ' + near if near else ''}")
    path = path.resolve()
    # A name of its own: a file called random.py is not the module that everyone else imports by that name.
    name = f"fastgrpo_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        # Its neighbours, which it may import.
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make(found: Any, name: str, options: Mapping[str, Any]) -> Reward:
    """A reward of a class, with `options` as its arguments; of a function that scores; or of an object with `score`.

    Raises ConfigError for options that it does not take, and for what cannot score; else what its constructor raises.
    """
    reward: Any
    if inspect.isclass(found):
        _check_call(found, (), options, f"'{name}' does not take its options")
        reward = found(**options)
    elif hasattr(found, "score"):
        reward = found
        if options:
            raise ConfigError(f"'{name}' is an object that is made already, and takes no options; name its class")
    elif callable(found):
        _check_call(found, (None, None, None), options, f"'{name}' should take {TAKES} and its options")
        return FunctionReward(found, options)
    else:
        raise ConfigError(f"'{name}' is {type(found).__name__}; name a class with score{TAKES}, or a function{TAKES}")
    if not callable(getattr(reward, "score", None)):
        raise ConfigError(f"'{name}' has no method score{TAKES}")
    _check_call(reward.score, (None, None, None), {}, f"'{name}'.score should take {TAKES}")
    return reward


def _check_call(called: Any, arguments: tuple, options: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError unless `called` can be called so, as far as its signature says."""
    try:
        signature = inspect.signature(called)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        names = [n for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
        unknown = next((n for n in options if n not in signature.parameters), None)
        hint = nearest(unknown, names) if unknown is not None else ""
        raise ConfigError(f"{what}: {error}; {hint}it takes ({', '.join(names)})") from None
