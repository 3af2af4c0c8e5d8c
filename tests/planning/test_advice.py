"""Out of memory: one line with the phase, the peak and the nearest settings that fit by a plan."""

import re

import pytest
import torch
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.config import dump
from fastgrpo.planning.advice import advice, explained, is_out_of_memory
from fastgrpo.planning.gpus import GIB, RESERVED, Gpu
from fastgrpo.planning.plan import plan


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_run_that_runs_out_says_where_and_what_needs_less(tiny_flux, tmp_path, monkeypatch, capsys):
    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr("fastgrpo.training.update.Updater.run", update)
    path = tmp_path / "c.yaml"
    path.write_text(dump(tiny_config(tiny_flux, tmp_path / "run")))
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    number = r"([\d.]+)"
    pattern = (
        f"error: out of memory in update: {number} of {number} GiB were in use; a plan needs {number} GiB, and "
        rf"{number} GiB with model\.activation_checkpointing=selective; is the memory used by something else too\?"
    )
    found = re.fullmatch(pattern, line)
    assert found, line
    most, memory, need, less = map(float, found.groups())
    assert 0 < most < memory
    assert less <= need
    # Another rank leaves the plan to the first.
    there = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert "says what fits" in str(explained(MemoryError(), tiny_config(tiny_flux, tmp_path)))


@pytest.mark.full
def test_the_nearest_settings_that_fit_are_those_of_the_plan(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", rollout={"forward_batch": 6})
    need = plan(config, Gpu("this device", 80 * GIB, 1.0, 1.0, 1.0), 1, 1).need
    # A little less than what it takes, with what a plan leaves free.
    memory = int((need - 0.1 * (need - RESERVED)) / 0.9)
    said = advice(config, memory, 1, 1)
    assert re.fullmatch(
        r"by a plan this fits: model\.activation_checkpointing=(selective|all).* \([\d.]+ GiB\)", said
    ), said
    assert advice(config, RESERVED, 1, 1).startswith("a plan needs ")
