"""Strict settings from YAML: sections, `key.sub=value` overrides, and errors of one line.

What cannot be used raises `ConfigError`, naming the key, the value, what is allowed and the nearest match.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fastgrpo.config.overrides import load_data
from fastgrpo.config.paths import expand_user
from fastgrpo.config.yaml import dump_yaml
from fastgrpo.errors import ConfigError, nearest

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
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
        raise ConfigError(*(f"{where}.{line}".lstrip(".") for line in _problems(kind, error))) from None


def dump_settings(settings: Section) -> str:
    """The settings as YAML, defaults included; `load_settings` reads them back as they are."""
    return dump_yaml(settings.model_dump(mode="json"))


def _problems(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for every setting that is wrong: the misspelt ones first, then in the order of the sections."""
    errors = error.errors(include_url=False)
    found: dict[str, list[str]] = {}
    for one in sorted(errors, key=lambda e: e["type"] != "extra_forbidden"):
        key = _place(kind, one["loc"], one["type"] == "extra_forbidden")[0]
        # Of a union's members each has its own error, and one line says them all.
        if key not in found or one["type"] == "value_error":
            found[key] = _lines(kind, one, errors)
    lines = [line for lines in found.values() for line in lines]
    # A misspelt key is often a missing one too: the misspelling is what to mend.
    meant = set(re.findall(r"(\S+): unknown setting; did you mean '(\w+)'", "\n".join(lines)))
    missing = {f"{'.'.join([*key.split('.')[:-1], name])}: this setting is required" for key, name in meant}
    return [line for line in lines if line not in missing]


def _lines(kind: type[BaseModel], error: ErrorDetails, errors: list[ErrorDetails]) -> list[str]:
    """What is wrong with one setting; several lines only where the check of a whole section says several."""
    key, sections = _place(kind, error["loc"], error["type"] == "extra_forbidden")
    given, context = error.get("input"), error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return [_flat(text) for text in getattr(context["error"], "problems", None) or [str(context["error"])]]
        case "missing":
            return [f"{key}: this setting is required"]
        case "extra_forbidden":
            return [_unknown(kind, key, str(error["loc"][-1]), sections)]
        case "union_tag_not_found":
            return [f"{key}.kind: this setting is required (one of: {', '.join(filter(None, map(tag_of, sections)))})"]
        case "union_tag_invalid":
            tag, options = context["tag"], context["expected_tags"]
            return [f"{key}.kind: {_shown(tag)} is not valid; {_near(tag, options)}it should be {_either([options])}"]
    same = [e for e in errors if _place(kind, e["loc"])[0] == key and e["type"] not in ("missing", "extra_forbidden")]
    wishes = list(dict.fromkeys(_wish(e) for e in same))
    hint = _near(given, ", ".join(str(e.get("ctx", {}).get("expected", "")) for e in same))
    return [f"{key}: {_shown(given)} is not valid; {hint}it should be {_either(wishes)}"]


# What other trainers call a setting, where the name itself does not lead to it.
OTHER_NAMES = {
    "learning_rate": "update.optimizer.lr", "adam_beta1": "update.optimizer.beta1",
    "adam_beta2": "update.optimizer.beta2", "lr_scheduler": "update.optimizer.schedule",
    "lr_warmup_steps": "update.optimizer.warmup", "warmup_steps": "update.optimizer.warmup", "ema": "update.ema_decay",
    "num_generations": "rollout.group_size", "num_samples_per_prompt": "rollout.group_size",
    "num_inference_steps": "rollout.steps", "sampling_steps": "rollout.steps", "num_steps": "rollout.steps",
    "batch_size": "rollout.forward_batch", "train_batch_size": "rollout.forward_batch", "noise_level": "rollout.eta",
    "guidance_scale": "model.guidance", "cfg": "model.guidance", "resolution": "model.height",
    "num_frames": "model.frames", "mixed_precision": "model.dtype", "precision": "model.dtype", "bf16": "model.dtype",
    "pretrained_model_name_or_path": "model.path", "lora_rank": "model.lora.rank", "lora_alpha": "model.lora.alpha",
    "gradient_checkpointing": "model.activation_checkpointing", "torch_compile": "model.compile",
    "clip_range": "objective.clip_high", "epsilon": "objective.clip_high", "beta": "objective.kl_weight",
    "kl_coeff": "objective.kl_weight", "num_epochs": "train.iterations", "max_train_steps": "train.iterations",
    "max_steps": "train.iterations", "output_dir": "run.dir", "resume_from_checkpoint": "run.resume",
    "dataset": "prompts.train", "prompt": "prompts.train", "save_steps": "checkpoint.every",
    "eval_steps": "eval.every", "wandb": "telemetry.wandb_project", "use_wandb": "telemetry.wandb_project",
}  # fmt: skip


def unknown_setting(kind: type[BaseModel], key: str) -> ConfigError:
    """The error for a dotted key that names no setting, with the one that was meant."""
    *sections, last = key.split(".")
    place = [int(part) if part.isdecimal() else part for part in sections]
    found, below = _place(kind, tuple(place))
    if place and found != ".".join(map(str, place)):
        return unknown_setting(kind, ".".join(sections))
    return ConfigError(_unknown(kind, key, last, below))


def _unknown(kind: type[BaseModel], key: str, name: str, sections: list[type[BaseModel]]) -> str:
    """The line for a setting that does not exist: what was meant here, or in which other section it is."""
    names, every = sorted({name for section in sections for name in section.model_fields}), settings_of(kind)
    meant = [place for place in every if place.rpartition(".")[2] == name]
    meant += [place for place in [OTHER_NAMES.get(name)] if place in every]
    hint = "" if meant else nearest(name, names)
    if not meant and not hint:
        lasts = {place.rpartition(".")[2] for place in every}
        close = difflib.get_close_matches(name, lasts, n=1, cutoff=0.75)
        meant = [place for place in every if place.rpartition(".")[2] in close]
    if meant:
        hint = f"did you mean {_either([f'{place!r}' for place in meant[:4]])}? "
    return f"{key}: unknown setting; {hint}(one of: {', '.join(names)})"


@functools.cache
def settings_of(kind: type[BaseModel]) -> tuple[str, ...]:
    """The dotted names of every setting below a section; a list of sections is entered by its first."""
    found: dict[str, None] = {}
    for name, field in kind.model_fields.items():
        found[name] = None
        listed = ".0" if holds_list(field.annotation) else ""
        for section in sections_in(field.annotation):
            found.update(dict.fromkeys(f"{name}{listed}.{inner}" for inner in settings_of(section)))
    return tuple(found)


def holds_list(annotation: Any) -> bool:
    if typing.get_origin(annotation) is list:
        return True
    return typing.get_origin(annotation) in (Union, types.UnionType, Annotated) and any(
        holds_list(argument) for argument in typing.get_args(annotation)
    )


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
        chosen = [section for section in sections if tag_of(section) == part]
        if fields:
            sections = [found for field in fields for found in sections_in(field.annotation)]
        elif chosen:
            sections = chosen
        if fields or isinstance(part, int) or (unknown and depth == len(loc) - 1):
            parts.append(str(part))
    return ".".join(parts), sections


def tag_of(section: type[BaseModel]) -> str | None:
    """The `kind` that chooses this section of a union, if it is one of a union."""
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        return [found for argument in typing.get_args(annotation) for found in sections_in(argument)]
    return []


def _shown(value: Any) -> str:
    """A value as YAML has it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else _flat(repr(value))
    return text if len(text) <= 60 else text[:57] + "…"


def _flat(text: str) -> str:
    return " ".join(text.split())
