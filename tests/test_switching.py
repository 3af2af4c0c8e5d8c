"""docs/switching.md names settings that exist, and every flag of the trainers it speaks of once."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fastgrpo import rewards
from fastgrpo.config import Config, OldPolicyDecay, SubsetSteps, TrainingTimes, WindowSteps
from fastgrpo.config.sections import Section

PAGE = (Path(__file__).parents[1] / "docs/switching.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, str]]:
    """Section, flags and our answer of every row of every table."""
    found, section = [], ""
    for line in PAGE.splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and len(cells) == 2 and cells[0] not in ("flag", "key", "---"):
            found.append((section, *cells))
    return found


def is_setting(path: str) -> bool:
    kind: Any = Config
    for part in path.split("."):
        if part not in kind.model_fields:
            return False
        options: list[Any] = [kind.model_fields[part].annotation]
        while options and not (isinstance(options[0], type) and issubclass(options[0], BaseModel)):
            options += getattr(options.pop(0), "__args__", ())
        kind = options[0] if options else Section
    return True


def test_every_setting_exists():
    named = {key for _, _, ours in rows() for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", ours) if "torch" not in key}
    assert len(named) > 50
    assert [key for key in sorted(named) if not is_setting(key)] == []
    assert not is_setting("rollout.setps")
    given = " ".join(part for _, _, ours in rows() for part in re.findall(r"\{(.*?)\}", ours))
    sections = (WindowSteps, SubsetSteps, TrainingTimes, OldPolicyDecay)
    known = {name for section in sections for name in section.model_fields}
    assert set(re.findall(r"[a-z]+", given)) - {"window", "subset", "random", "levels"} <= known


def test_every_flag_has_one_row_and_an_answer():
    seen: dict[tuple[str, str], int] = {}
    for section, flags, ours in rows():
        assert ours, flags
        # What is not supported says what to use.
        if "not supported" in ours and "is not supported" not in ours:
            assert "not supported: " in ours, flags
        for flag in re.findall(r"`(--[a-z0-9_]+)`", flags):
            seen[section, flag] = seen.get((section, flag), 0) + 1
    assert [flag for flag, times in seen.items() if times > 1] == []
    assert len([flag for section, flag in seen if section == "DanceGRPO"]) == 85


# Other trainers' words for ours, and words that say nothing of what a flag does.
SAME_WORDS = {"bestofn": "best of", "chosen": "best of", "adam": "adamw", "attn": "attention", "cfg": "guidance"}
SILENT = {"use", "num", "number", "train", "sample", "enable", "type", "sec", "log", "data", "n"}


def words_of(name: str) -> set[str]:
    parts: list[str] = re.findall(
        r"[0-9]*[a-z]+", name.lower().replace("8bit", "eightbit").replace("guidance_scale", "guidance")
    )
    return {word for part in parts for word in SAME_WORDS.get(part, part).split()}


def abilities() -> list[tuple[str, set[str]]]:
    """Every setting, every value that one may be named, and every reward, each with its words."""
    found: list[tuple[str, set[str]]] = [(name, words_of(name)) for name in rewards.available()]

    def collect(kind: type[BaseModel], path: str) -> None:
        for name, field in kind.model_fields.items():
            here, options = f"{path}.{name}".lstrip("."), [field.annotation]
            found.append((here, words_of(here)))
            while options:
                option = options.pop()
                if isinstance(option, type) and issubclass(option, BaseModel):
                    collect(option, here)
                for inner in getattr(option, "__args__", ()):
                    if isinstance(inner, str):
                        found.append((f"{here} {inner}", words_of(here) | words_of(inner)))
                    else:
                        options.append(inner)

    collect(Config, "")
    return found


def done_by(flags: str, answer: str) -> list[str]:
    """The settings that do what a row says is not supported."""
    refused = re.findall(r"([\w-]+)-based is not supported", answer)
    if answer.startswith("not supported"):
        refused += [flag.rpartition(".")[2].lstrip("-") for flag in re.findall(r"`([^`]+)`", flags)]
        refused += re.findall(r"\b(\w+)(?=,)", re.sub(r"`[^`]+`", "", flags))
    wanted = [words_of(name) - SILENT for name in refused]
    return [name for name, words in abilities() if any(w and w <= words for w in wanted)]


def test_nothing_is_called_unsupported_that_a_setting_does():
    wrong = {flags: found for _, flags, answer in rows() if (found := done_by(flags, answer))}
    assert wrong == {}


@pytest.mark.parametrize(
    "flags, answer, setting",
    [
        ("`--bestofn`", "not supported: all are trained", "rollout.best_of"),
        ("`chosen_number`", "not supported: all are trained", "rollout.best_of"),
        ("`train.use_8bit_adam`", "not supported: use `model.lora`", "update.optimizer.kind adamw_8bit"),
        ("`--use_videoalign_mq`", "not supported: a server", "videoalign_mq"),
        ("`model.attn_backend`", "not supported: an environment variable", "model.attention_backend"),
        ("`train.lora_path`", "not supported: fuse it", "model.lora.path"),
        ("`train.kl_type`", "`objective.kl_weight`, x-based; v-based is not supported", "objective.kl v"),
        ("`sample.eval_guidance_scale`", "not supported: that of training", "eval.guidance"),
        ("`train.trainer_type` x, dpmpp_2m, y", "not supported: no", "rollout.suffix_solver dpmpp_2m"),
    ],
)
def test_a_row_that_is_out_of_date_is_found(flags, answer, setting):
    assert setting in done_by(flags, answer)


@pytest.mark.parametrize("row", [r for r in rows() if "not needed" in r[2]], ids=lambda r: r[1][:30])
def test_what_is_not_needed_says_why(row):
    assert "not needed because " in row[2]
