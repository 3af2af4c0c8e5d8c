"""Callbacks of a user's own: named in the config, their state in the checkpoint, each mistake one line."""

import pytest
from support.runs import callback_of
from support.tiny import tiny_config

from fastgrpo.errors import ConfigError
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.setup import load_callback
from fastgrpo.training.trainer import Trainer


class Counted(Callback):
    """Counts iterations, over resumes too."""

    def __init__(self):
        self.count = 0

    def after_iteration(self, trainer):
        self.count += 1

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


class Numbered(Callback):
    def __init__(self, number):
        self.number = number


def test_it_stands_before_the_checkpoint_that_keeps_its_state(tiny_flux, tmp_path):
    for iterations in (1, 3):
        trainer = Trainer.from_config(
            tiny_config(
                tiny_flux, tmp_path, run={"resume": "auto"}, train={"iterations": iterations},
                callbacks=["test_callbacks:Counted"], eval={"every": 5, "images": 2},
            )
        )  # fmt: skip
        trainer.run()
        kinds = [type(callback) for callback in trainer.callbacks]
        assert kinds.index(EvaluationCallback) < kinds.index(Counted) < kinds.index(CheckpointCallback)
        assert callback_of(trainer, Counted).count == iterations


@pytest.mark.parametrize(
    "name, words",
    [
        ("test_callbacks", "is not module:Class"),
        ("no_such_module:Counted", "cannot be imported: No module named 'no_such_module'"),
        ("test_callbacks:Missing", "cannot be imported: module 'test_callbacks' has no attribute 'Missing'"),
        ("test_callbacks:tiny_config", "is not a subclass of fastgrpo.training.callbacks.Callback"),
        ("test_callbacks:Numbered", "cannot be made without arguments: "),
    ],
    ids=["no class", "no module", "no attribute", "another thing", "arguments"],
)
def test_a_name_that_is_no_callback_is_one_line(name, words):
    with pytest.raises(ConfigError, match=f"^callbacks: '{name}' {words}") as caught:
        load_callback(name)
    assert "\n" not in str(caught.value)
