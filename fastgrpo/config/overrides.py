"""The plain data of a YAML file, and `key.sub=value` overrides of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config.paths import expand_user
from fastgrpo.config.yaml import kind_of, parse_yaml
from fastgrpo.errors import ConfigError, nearest


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data of a YAML file with overrides, not validated yet. Raises ConfigError."""
    path = Path(expand_user(str(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot read the config: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        # A ValueError is of a name that no file can have.
        reason = error.strerror if isinstance(error, OSError) else error
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]).strip()
        raise ConfigError(f"{path}: cannot read the config: {reason}{'; ' + near if near else ''}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config should be a mapping of sections, not {kind_of(data)}")
    for item in overrides:
        override(data, item)
    return data


def _value(text: str, key: str) -> Any:
    """The value of an override. One that is plain text is taken whole: to a command line ` #` begins no comment."""
    plain = text.lstrip()[:1] not in tuple("[{\"'&*!|>")
    return text.strip() if plain and re.search(r"(^|\s)#", text) else parse_yaml(text, key)


def override(data: dict, item: str) -> None:
    """Sets `key.sub=value` in plain data; a list is entered by index."""
    key, equals, value = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"'{item}': an override is written key.sub=value, such as train.iterations=10")
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{key}: '{part}' is not an index of a list of {len(node)}, which counts from 0")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            raise ConfigError(f"{key}: '{'.'.join(parts[:depth])}' is {kind_of(node)}, not a section")
        if last:
            node[place] = _value(value, key)
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
