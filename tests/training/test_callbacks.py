"""Callbacks of users: what cannot be one is one line, and states are kept."""

from typing import Any

import numpy as np
import pytest
from support.tiny import tiny_config

from fastgrpo.errors import ConfigError, UserError
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.setup import load_callbacks
from fastgrpo.training.trainer import Trainer


class Counts(Callback):
    """Its state is what it is given."""

    kept: Any = 0

    def state(self):
        return {"kept": self.kept}


class Same(Callback):
    name = Counts.name


class Guard(Callback):
    name = "guard"


class NoToken(Callback):
    def __init__(self):
        raise KeyError("TOKEN")


@pytest.mark.parametrize(
    "names, said",
    [
        (["Counts", "Counts"], "'test_callbacks:Counts' is not the only one whose name is 'test_callbacks:Counts'"),
        (["Counts", "Same"], "'test_callbacks:Same' is not the only one"),
        (["Guard"], "not the only one whose name is 'guard'"),
        (["NoToken"], "'test_callbacks:NoToken' cannot be made without arguments: KeyError: 'TOKEN'"),
        (["Cuonts"], "did you mean 'Counts'"),
        (["tiny_config"], "is not a subclass of"),
    ],
    ids=str,
)
def test_what_cannot_be_a_callback_is_one_line(names, said):
    with pytest.raises(ConfigError) as caught:
        load_callbacks([f"test_callbacks:{name}" for name in names])
    assert said in str(caught.value)


@pytest.mark.parametrize("text, said", [("x = (", "SyntaxError"), ("open('/none')", "FileNotFoundError")])
def test_a_module_that_fails_is_one_line(text, said, tmp_path, monkeypatch):
    (tmp_path / f"broken_{said}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"callbacks: 'broken_{said}:Quick' cannot be imported: .*{said}"):
        load_callbacks([f"broken_{said}:Quick"])


def test_a_state_that_a_checkpoint_cannot_keep_is_told_before_the_first_iteration(tiny_flux, tmp_path):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", callbacks=["test_callbacks:Counts"]))
    kept = Counts.of(trainer)
    assert kept is not None
    kept.kept = np.float32(1)
    with pytest.raises(UserError, match=r"the state of 'test_callbacks:Counts' is not plain data.*float32"):
        trainer.run()
    assert trainer.iteration == 0
