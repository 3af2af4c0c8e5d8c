"""Damaged inputs, a handful of each kind (a thousand: fastgrpo bench stay inputs): one line or a right run."""

import pytest

from fastgrpo.commands.bench import load, stay
from fastgrpo.errors import UserError

inputs = load("inputs")
COUNTS = {"reward modules": 60, "prompt files": 60, "model directories": 8, "scheduler configs": 8}


@pytest.mark.parametrize("kind", COUNTS)
def test_a_damaged_input_is_one_line_or_a_right_run(kind):
    outcomes = [inputs.trial(kind, number) for number in range(COUNTS[kind])]
    assert set(outcomes) == {"a line", "a run"}, outcomes


def test_a_traceback_would_be_seen(monkeypatch):
    monkeypatch.setattr(inputs, "load_prompts", lambda path: 1 / 0)
    assert inputs.trial("prompt files", 0).startswith("traceback: ZeroDivisionError")


def test_a_seed_is_for_what_is_random():
    with pytest.raises(UserError, match="--seed: nothing of `bench stay costs` is random"):
        stay("costs", seed=1)
