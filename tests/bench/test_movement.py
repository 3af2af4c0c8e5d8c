"""How far an update moves the policy: nothing before its first step, by the square of the learning rate after it."""

import pytest
from support.tiny import tiny_config

from fastgrpo.commands.bench import load
from fastgrpo.config.sections import dump_settings
from fastgrpo.training.trainer import Trainer

bench = load("movement")


def test_nothing_moves_before_a_step(tiny_flux, tmp_path):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run"))
    batch = trainer.rollouts.take(0)
    trainer.rollouts.collect(batch)
    assert bench.movement(trainer.updater, batch) == 0


def test_a_step_moves_by_the_square_of_the_rate(tiny_flux, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux)))
    slow, fast = (bench.measure(str(path), 1, [f"update.optimizer.lr={rate}"])[0] for rate in (1e-6, 2e-6))
    assert slow > 0
    assert fast == pytest.approx(4 * slow, rel=0.1)
    assert "1 step 1 2: Q" in capsys.readouterr().out
