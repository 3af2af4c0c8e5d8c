"""Callbacks of users: what cannot be one is one line, states are kept, and any rank may end the run."""

import os
import signal
from typing import Any

import numpy as np
import pytest
from support.processes import run_ranks
from support.runs import callback_of
from support.tiny import tiny_config

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.errors import ConfigError, PreemptedError, UserError
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.setup import distinct, load_callback
from fastgrpo.training.trainer import Trainer


class Counts(Callback):
    """Its state is what it is given."""

    kept: Any = 0

    def state(self):
        return {"kept": self.kept}


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


class Same(Callback):
    name = Counts.name


class Guard(Callback):
    name = "guard"


class NoToken(Callback):
    def __init__(self):
        raise KeyError("TOKEN")


class Halts(Callback):
    """Ends the run on the last rank alone, whose clock says so."""

    def after_iteration(self, trainer):
        if trainer.iteration == 1 and trainer.world.process == trainer.world.ranks - 1:
            trainer.halted = "it is late"


class Warned(Callback):
    """A scheduler's warning after the first iteration."""

    def after_iteration(self, trainer):
        if trainer.iteration == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


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


def test_the_state_of_a_callback_of_a_file_is_kept_wherever_the_file_lies(tmp_path):
    names = set()
    for folder in ("here", "there"):
        file = tmp_path / folder / "mine.py"
        file.parent.mkdir()
        file.write_text("import fastgrpo\nclass Quick(fastgrpo.Callback): pass\n")
        names |= {load_callback(f"{file}:Quick").name}
    assert names == {"mine.py:Quick"}


@pytest.mark.parametrize(
    "names, said",
    [
        (["Counts", "Counts"], "Counts is not the only one whose name is 'test_callbacks:Counts'"),
        (["Counts", "Same"], "Same is not the only one"),
        (["Guard"], "not the only one whose name is 'guard'"),
        (["NoToken"], "'test_callbacks:NoToken' cannot be made without arguments: KeyError: 'TOKEN'"),
        (["Hlats"], "did you mean 'Halts'"),
        (["CheckpointStore"], "is not a subclass of"),
    ],
    ids=str,
)
def test_what_cannot_be_a_callback_is_one_line(names, said):
    with pytest.raises(ConfigError) as caught:
        distinct([load_callback(f"test_callbacks:{name}") for name in names])
    assert said in str(caught.value)


@pytest.mark.parametrize("text, said", [("x = (", "SyntaxError"), ("open('/none')", "FileNotFoundError")])
def test_a_module_that_fails_is_one_line(text, said, tmp_path, monkeypatch):
    (tmp_path / f"broken_{said}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"callbacks: 'broken_{said}' cannot be imported: .*{said}"):
        load_callback(f"broken_{said}:Quick")


def test_a_state_that_a_checkpoint_cannot_keep_is_told_before_the_first_iteration(tiny_flux, tmp_path):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", callbacks=["test_callbacks:Counts"]))
    kept = Counts.of(trainer)
    assert kept is not None
    kept.kept = np.float32(1)
    with pytest.raises(UserError, match=r"the state of 'test_callbacks:Counts' is not plain data.*float32"):
        trainer.run()
    assert trainer.iteration == 0


def run_halted(config) -> None:
    with pytest.raises(UserError, match=r"it is late|another rank"):
        Trainer.from_config(config).run()


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_rank_ends_the_run_for_all(tiny_flux, tmp_path, staleness):
    more = {"scoring": {"staleness": staleness}, "parallel": {"timeout": 60.0}, "callbacks": ["test_callbacks:Halts"]}
    run_ranks(tmp_path, run_halted, tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 9}, **more))
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [1 + staleness]


def test_a_signal_is_seen_where_every_iteration_has_a_checkpoint_and_samples_ahead(tiny_flux, tmp_path):
    more = {"scoring": {"staleness": 1}, "checkpoint": {"every": 1}, "callbacks": ["test_callbacks:Warned"]}
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 6}, **more))
    with pytest.raises(PreemptedError):
        trainer.run()
    assert trainer.iteration <= 3
