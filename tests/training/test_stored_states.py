"""Real states of a training, replayed by the objective in PyTorch and by the kernels' loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.updates import ALONE, Recorder, apart, oracle_gradients

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.config import load_config
from fastgrpo.rollout.generator import Batch
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import Updater

RECIPE = Path(__file__).parents[2] / "configs/shapes-flux.yaml"
SETTINGS = {
    "full": [],
    "lora-kl": ["model.lora={rank: 4}", "objective.kl_weight=0.05"],
}
STORED = (1, 10, 20)


def replayed(trainer: Trainer, batch: Batch, advantages: Advantages, kl_weight: float) -> tuple[float, ...]:
    """(gradients apart in norms, losses apart, size of the loss, largest |ratio − 1|), at the trainer's weights."""
    config, family = trainer.config, trainer.family
    recorder = Recorder(family.policy, config.update)
    updater = Updater(family, config, ALONE, recorder, trainer.updater.reference)
    result = updater.run(batch, advantages, kl_weight)
    loss, expected = oracle_gradients(
        updater, batch.schedule, batch.trajectory, batch.conditioning, advantages.terms, kl_weight, batch.iteration
    )
    pairs = len(batch.trajectory.layout.pair_row)
    [found] = recorder.seen
    losses = abs(result.statistics.loss.item() - loss) / pairs
    return apart(found, expected), losses, abs(loss) / pairs, result.statistics.max_deviation.item()


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_kernels_loss_is_the_objective_in_pytorch(tmp_path, monkeypatch, settings):
    small = ["rollout.prompts_per_iteration=6", "rollout.group_size=6", "train.iterations=20"]
    quiet = ["telemetry.progress=false", "eval.every=0", "callbacks=[]", f"run.dir={tmp_path}/run"]
    trainer = Trainer.from_config(load_config(RECIPE, [*small, *quiet, *SETTINGS[settings]]))
    update, found = trainer.updater.run, {}

    def compared(batch, advantages, kl_weight, replay):
        number = batch.iteration + 1
        if number not in STORED:
            return update(batch, advantages, kl_weight, replay)
        # Before the step the policy is that of the rollout; after it the ratios are not 1, and some are clipped.
        found[number, "before"] = replayed(trainer, batch, advantages, kl_weight)
        result = update(batch, advantages, kl_weight, replay)
        found[number, "after"] = replayed(trainer, batch, advantages, kl_weight)
        return result

    monkeypatch.setattr(trainer.updater, "run", compared)
    for _ in range(20):
        trainer.step()
    assert list(found) == [(number, when) for number in STORED for when in ("before", "after")]
    assert max(size for _, _, size, _ in found.values()) > 1e-5
    for (_, when), (gradients, losses, _, deviation) in found.items():
        assert gradients < 1e-6
        assert losses < 1e-7
        assert (deviation == 0) is (when == "before")
