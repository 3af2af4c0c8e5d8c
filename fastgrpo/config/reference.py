"""The reference of the settings, from the settings themselves: docs/config.md, a JSON schema for editors, and what
`fastgrpo config [KEY]` prints.

fastgrpo config > docs/config.md
fastgrpo config --schema > docs/config.schema.json
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastgrpo.config.schema import Config
from fastgrpo.config.sections import holds_list, sections_in, tag_of, unknown_setting

HEAD = """# Every setting

This page is generated from `fastgrpo/config/schema.py` by `fastgrpo config > docs/config.md`; a test holds it to that.
`fastgrpo config KEY` prints a part of it, such as `fastgrpo config rollout` or `fastgrpo config update.optimizer.lr`. A
config gives the settings that differ from their defaults; a command line overrides them as `key.sub=value`.

An editor with a YAML language server completes and checks a config that begins with this line (the path is that of
[config.schema.json](config.schema.json), or its address):

```yaml
# yaml-language-server: $schema=docs/config.schema.json
```
"""


@dataclass(frozen=True)
class Setting:
    """One setting. key: dotted, its list index as N; takes: what it may be; default: as YAML, `required`, or empty for
    a section; of: the sections below it."""

    key: str
    takes: str
    default: str
    description: str
    of: tuple[type[BaseModel], ...] = ()


def settings(kind: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting below a section, in order; a section comes before its own. Of several forms (`kind`) each is there,
    a setting that they share once."""
    for name, field in kind.model_fields.items():
        key, below = f"{prefix}{name}", tuple(sections_in(field.annotation))
        yield Setting(key, _takes(field), _default(field, bool(below)), _description(field, below), below)
        deeper = f"{key}.N." if holds_list(field.annotation) else f"{key}."
        yield from _merged([list(settings(section, deeper)) for section in below], [tag_of(s) for s in below])


def _merged(forms: list[list[Setting]], tags: list[str | None]) -> list[Setting]:
    """The settings of a section, or of its several forms as one list that says which form each is of."""
    if len(forms) < 2:
        return [setting for form in forms for setting in form]
    found: dict[str, list[tuple[str | None, Setting]]] = {}
    for tag, form in zip(tags, forms, strict=True):
        for setting in form:
            found.setdefault(setting.key, []).append((tag, setting))
    merged = []
    for key, entries in found.items():
        first = entries[0][1]
        if key.endswith(".kind"):
            takes = " or ".join(setting.takes for _, setting in entries)
            said = " ".join(setting.description for _, setting in entries)
            first = replace(first, takes=takes, description=said)
        elif len(entries) < len(forms):
            first = replace(first, description=f"With kind {entries[0][0]}: {first.description}")
        merged.append(first)
    return merged


def find(key: str) -> list[Setting]:
    """A setting, and what is below it; `rewards.0.weight` is `rewards.N.weight`. Raises ConfigError for no setting."""
    wanted = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    found = [s for s in settings() if s.key == wanted or s.key.startswith(f"{wanted}.")]
    if not found:
        raise unknown_setting(Config, key)
    return found


def as_text(key: str) -> str:
    """What `fastgrpo config KEY` prints."""
    first, *below = find(key)
    lines = [f"{first.key}: {first.description}"]
    if first.of:
        width = max((len(s.key) for s in below), default=0)
        lines += [f"  {s.key:<{width}}  {_said(s)}" for s in below]
    else:
        lines += [f"  takes    {first.takes}", f"  default  {first.default}"]
    return "\n".join(lines)


def _said(setting: Setting) -> str:
    default = f" (default {setting.default})" if setting.default not in ("", "required") else ""
    return f"{setting.takes}{default}: {setting.description}" if not setting.of else setting.description


def as_markdown() -> str:
    """docs/config.md."""
    parts = [HEAD]
    for name in Config.model_fields:
        first, *below = find(name)
        parts.append(f"## {name}\n\n{first.description}\n")
        rows = [s for s in below if not s.of] or [first]
        parts.append("| setting | takes | default | |\n| --- | --- | --- | --- |")
        parts.append("\n".join(f"| {' | '.join(_cells(s))} |" for s in rows) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def _cells(setting: Setting) -> list[str]:
    default = f"`{setting.default}`" if setting.default not in ("", "required") else setting.default
    return [
        text.replace("|", "\\|").replace("<", "&lt;")
        for text in (f"`{setting.key}`", setting.takes, default, setting.description)
    ]


def as_schema() -> str:
    """The JSON schema of a config, with descriptions and defaults, for editors."""
    schema = Config.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


def _description(field: FieldInfo, below: tuple[type[BaseModel], ...]) -> str:
    """Its own, else of a section the first paragraph of its docstring; empty where nobody wrote one."""
    own = field.description or ""
    if not own and below:
        own = " ".join(f"{' '.join((s.__dict__.get('__doc__') or '').split(chr(10) * 2)[0].split())}" for s in below)
    return " ".join(own.split())


def _default(field: FieldInfo, section: bool) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or (section and value is not None):
        return ""
    if value is None or isinstance(value, bool) or value == "":
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _takes(field: FieldInfo) -> str:
    """What a setting may be, in the words of someone who writes YAML."""
    forms = list(dict.fromkeys(_forms(field.annotation, field.metadata)))
    return forms[0] if len(forms) == 1 else f"{', '.join(forms[:-1])} or {forms[-1]}"


PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true, false",
    type(None): "null",
    Any: "anything",
}


def _forms(annotation: Any, metadata: Any = ()) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _forms(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return [str(a) if not isinstance(a, bool) else str(a).lower() for a in arguments]
    if origin in (Union, types.UnionType):
        # null comes last, as it reads.
        ordered = sorted(arguments, key=lambda a: a is type(None))
        return [form for argument in ordered for form in _forms(argument, metadata if argument in PLAIN else ())]
    if origin is list:
        return [f"a list of {' or '.join(_forms(arguments[0]))}".replace("a list of a ", "a list of ")]
    if origin is dict:
        return ["a section"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["a section"]
    return [f"{PLAIN[annotation]}{_bounds(metadata) if annotation in (int, float) else ''}"]


def _bounds(metadata: Any) -> str:
    """The limits of a number."""
    found: dict[str, Any] = {}
    for one in metadata:
        parts = [one, *getattr(one, "metadata", [])]
        for part in parts:
            found |= {n: getattr(part, n) for n in ("gt", "ge", "lt", "le") if getattr(part, n, None) is not None}
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    shown = {n: v for n, v in found.items() if not (n == "lt" and v >= 2**31)}
    return " and".join(f" {signs[n]} {v:g}" for n, v in shown.items())
