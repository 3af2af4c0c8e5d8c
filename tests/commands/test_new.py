"""From nothing to a trained LoRA with a reward of one's own, loaded in diffusers, in five commands."""

import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processes import run_ranks

from fastgrpo.commands.main import main
from fastgrpo.config import load_config
from fastgrpo.preflight.checks import preflight

ROOT = Path(__file__).parents[2]


def test_five_commands_to_a_lora_of_ones_own_reward_in_diffusers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["train.iterations=2", "eval.every=0", "rollout.prompts_per_iteration=2", "rollout.group_size=4"]
    assert main(["new", "my own"]) == 0
    told = capsys.readouterr().out
    commands = [line.removeprefix("Next: ").strip() for line in told[told.index("Next: ") :].splitlines()]
    assert len(commands) == 4, "and the one that told them"
    for command in commands[:3]:
        words = shlex.split(command)
        assert words[0] == "fastgrpo"
        assert main([*words[1:], *(small if words[1] == "train" else [])]) == 0, capsys.readouterr().err
    assert "96 prompts" in capsys.readouterr().out
    python, script = shlex.split(commands[3])
    assert python == "python"
    (said,) = run_ranks(tmp_path, runpy.run_path, script, None, "__main__", ranks=1)
    picture = np.asarray(Image.open(said.splitlines()[-1]))
    assert picture.shape == (32, 32, 3)
    assert picture.std() > 0
    assert list((tmp_path / "my own" / "exported").glob("*.safetensors"))
    assert main(["new", "my own"]) == 2
    assert "my own: is not empty; name a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["sd-1x24gb", "flux-lora-1x24gb", "wan-2.1-1.3b-lora-1x24gb", "flux-parity-8xh100", "shapes-words-flux"]
)
def test_a_recipe_keeps_all_but_its_reward_and_prompts(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "configs" / f"{name}.yaml"
    assert main(["new", "mine", "--from", str(recipe)]) == 0
    ours, theirs = load_config("mine/config.yaml"), load_config(recipe)
    for section in ("model", "rollout", "objective", "update", "train", "parallel", "checkpoint"):
        assert getattr(ours, section) == getattr(theirs, section), section
    assert ours.prompts.select == theirs.prompts.select
    assert [spec.name for spec in ours.rewards] == ["mine/reward.py:warmth"]
    found = preflight(ours)
    assert not [p for p in found.problems if "divide" not in p]
    assert {len(prompts) for prompts in found.prompts.values()} == {96, 24}
    if name == "shapes-words-flux":
        assert all(p.text.startswith("a sign that says") for prompts in found.prompts.values() for p in prompts)
