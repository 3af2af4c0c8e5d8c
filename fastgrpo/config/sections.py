"""Strict settings from YAML: sections, `key.sub=value` overrides, and errors of one line.

What cannot be used raises `ConfigError`, naming the key, the value, what is allowed and the nearest match.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fastgrpo.config.overrides import load_data
from fastgrpo.config.yaml import dump_yaml
from fastgrpo.errors import ConfigError, nearest

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


def expand_user(path: str) -> str:
    """A path with `~` and `~name` as the home directories that a shell would make of them."""
    return os.path.expanduser(path) if path.startswith("~") else path


# A path, or what may also be another source: with a home directory in place of ~.
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_user)]


class Section(BaseModel):
    """A group of settings: no unknown keys, no conversion of types, no change afterwards."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


SectionType = TypeVar("SectionType", bound=Section)


def load_settings(kind: type[SectionType], path: str | Path, overrides: Sequence[str] = ()) -> SectionType:
    """The settings of a YAML file and `key.sub=value` overrides. Raises ConfigError."""
    return validate_settings(kind, load_data(path, overrides))


def validate_settings(kind: type[SectionType], data: Any, where: str = "") -> SectionType:
    """Settings from plain data, named `where.<key>` in the one line of the ConfigError that it raises."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}.{_one_line(kind, error)}".lstrip(".")) from None


def dump_settings(settings: Section) -> str:
    """The settings as YAML, defaults included; `load_settings` reads them back as they are."""
    return dump_yaml(settings.model_dump(mode="json"))


def _one_line(kind: type[BaseModel], error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key is often a missing one too: the misspelling is what to mend.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key, sections = _place(kind, first["loc"], first["type"] == "extra_forbidden")
    given, context = first.get("input"), first.get("ctx", {})
    match first["type"]:
        case "value_error":
            return _flat(f"{context['error']}")
        case "missing":
            return f"{key}: this setting is required"
        case "extra_forbidden":
            names = sorted({name for section in sections for name in section.model_fields})
            return f"{key}: unknown setting; {nearest(str(first['loc'][-1]), names)}(one of: {', '.join(names)})"
        case "union_tag_not_found":
            return f"{key}.kind: this setting is required (one of: {', '.join(filter(None, map(_tag, sections)))})"
        case "union_tag_invalid":
            tag, options = context["tag"], context["expected_tags"]
            return f"{key}.kind: {_shown(tag)} is not valid; {_near(tag, options)}it should be {_either([options])}"
    same = [e for e in errors if _place(kind, e["loc"])[0] == key and e["type"] != "missing"]
    wishes = list(dict.fromkeys(_wish(e) for e in same))
    hint = _near(given, ", ".join(str(e.get("ctx", {}).get("expected", "")) for e in same))
    return f"{key}: {_shown(given)} is not valid; {hint}it should be {_either(wishes)}"


_WISHES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "recursion_loop": "a section that does not hold itself",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "literal_error": "{expected}",
    "invalid_key": "text",
}


def _wish(error: ErrorDetails) -> str:
    """What a value should have been, in the words of someone who writes YAML."""
    template = _WISHES.get(error["type"])
    if template is None:
        return _flat(error["msg"]).removeprefix("Input should be ")
    context = {
        name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in error.get("ctx", {}).items()
    }
    return template.format(**context).replace(" or '", ", '")


def _either(wishes: Iterable[str]) -> str:
    """'a', 'b' or 'c'."""
    options = [option for wish in wishes for option in re.split(r", (?=')", wish)]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _near(given: Any, expected: str) -> str:
    """The nearest of the quoted options, whatever its case."""
    options = {option.lower(): option for option in re.findall(r"'([^']+)'", expected)}
    match = difflib.get_close_matches(given.lower(), options, n=1) if isinstance(given, str) else []
    return f"did you mean '{options[match[0]]}'? " if match else ""


def _place(
    kind: type[BaseModel], loc: tuple[int | str, ...], unknown: bool = False
) -> tuple[str, list[type[BaseModel]]]:
    """The dotted key of a pydantic location, and the sections that stand there.

    A location also names members of unions, which nobody wrote: they are left out. With `unknown`, its last part is
    a setting that does not exist, and the sections are those that it was written in.
    """
    sections = [kind]
    parts = []
    for depth, part in enumerate(loc):
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        chosen = [section for section in sections if _tag(section) == part]
        if fields:
            sections = [found for field in fields for found in _sections_in(field.annotation)]
        elif chosen:
            sections = chosen
        if fields or isinstance(part, int) or (unknown and depth == len(loc) - 1):
            parts.append(str(part))
    return ".".join(parts), sections


def _tag(section: type[BaseModel]) -> str | None:
    """The `kind` that chooses this section of a union, if it is one of a union."""
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        return [found for argument in typing.get_args(annotation) for found in _sections_in(argument)]
    return []


def _shown(value: Any) -> str:
    """A value as YAML has it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else _flat(repr(value))
    return text if len(text) <= 60 else text[:57] + "…"


def _flat(text: str) -> str:
    return " ".join(text.split())
