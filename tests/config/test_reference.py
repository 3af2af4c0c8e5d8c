"""The reference of the settings: complete, described, and what the documents hold."""

import json
import re
from pathlib import Path

import pytest

from fastgrpo.commands.main import main
from fastgrpo.config import Config
from fastgrpo.config.reference import as_markdown, as_schema, settings
from fastgrpo.config.sections import settings_of

ROOT = Path(__file__).parents[2]
ALL = {setting.key: setting for setting in settings()}


def test_every_setting_is_there_and_described():
    assert [key for key, setting in ALL.items() if not setting.description] == []
    assert {key.replace(".N.", ".0.") for key in ALL} == set(settings_of(Config))
    assert len(ALL) > 130


@pytest.mark.parametrize("name, made", [("config.md", as_markdown), ("config.schema.json", as_schema)])
def test_the_documents_are_what_the_settings_say(name, made):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made(), f"fastgrpo config writes docs/{name}"


def test_what_a_setting_takes_is_in_words():
    said = {key: (ALL[key].takes, ALL[key].default) for key in ALL}
    assert said["run.seed"] == ("a whole number ≥ 0", "0")
    assert said["run.resume"] == ("true, false or auto", "false")
    assert said["rollout.shift"] == ("a number > 0 or pipeline", "pipeline")
    assert said["rollout.trained.kind"] == ("window or subset", "window")
    assert said["update.optimizer.beta1"] == ("a number ≥ 0 and < 1", "0.9")
    assert said["model.family"] == ("text", "required")
    assert said["model.lora.targets"] == ("a list of text or null", "null")
    assert ALL["rollout.trained.fraction"].description.startswith("With kind subset: ")


def test_the_command_prints_a_setting_or_a_section(capsys):
    assert main(["config", "update.optimizer.eps"]) == 0
    assert capsys.readouterr().out == (
        "update.optimizer.eps: Added to the root of the mean square that divides.\n"
        "  takes    a number > 0\n  default  1e-08\n"
    )
    assert main(["config", "rewards.0.weight"]) == 0
    assert capsys.readouterr().out.startswith("rewards.N.weight: 0: watched, not trained.")
    assert main(["config", "rollout"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rollout: How samples are drawn")
    assert any(
        re.match(r"  rollout\.group_size +a whole number ≥ 2 \(default 12\): Samples of each prompt\.$", x)
        for x in lines
    )
    assert main(["config"]) == 0
    assert capsys.readouterr().out == as_markdown()
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


@pytest.mark.parametrize(
    "key, words",
    [
        ("update.lr", "update.lr: unknown setting; did you mean 'update.optimizer.lr'?"),
        ("lr", "lr: unknown setting; did you mean 'update.optimizer.lr'?"),
        ("rolout", "rolout: unknown setting; did you mean 'rollout'?"),
        ("rewards.0.wieght", "did you mean 'weight'?"),
        ("qq.like.it", "qq: unknown setting; (one of: advantage,"),
    ],
)
def test_the_command_names_what_was_meant(key, words, capsys):
    assert main(["config", key]) == 2
    assert words in capsys.readouterr().err
