"""The loop: resume is bit-identical, failures are named, nothing written is lost."""

import os
import signal

import numpy as np
import pytest
import torch
from support.runs import callback_of, finished, metrics, weights
from support.tiny import tiny_config

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.commands.train import train
from fastgrpo.errors import ConfigError, PreemptedError, UserError
from fastgrpo.models import load_family
from fastgrpo.rewards import Scores
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.trainer import Trainer


class HalfFails:
    """Scores half of the samples, by their mean."""

    def score(self, samples, prompts, fps):
        values = samples.mean(dim=(1, 2, 3)).double().numpy()
        return Scores(values, np.arange(len(values)) % 2 == 0)


class Raises:
    def score(self, samples, prompts, fps):
        raise RuntimeError("the reward server is on fire")


@pytest.mark.parametrize("variant", ["full", "lora_kl", "subset_two_steps", "spread", "adamw_8bit", "auto"])
def test_resumed_is_bit_identical_to_uninterrupted(tiny_flux, tmp_path, variant):
    sections = {
        "full": {"update": {"ema_decay": 0.9}, "eval": {"every": 2, "images": 6}},
        "lora_kl": {"model": {"lora": {"rank": 4}}, "objective": {"kl_weight": 0.1}},
        "spread": {"prompts": {"select": "spread"}, "rollout": {"suffix_steps": 1}, "model": {"trainable": ["to_v"]}},
        "adamw_8bit": {"update": {"optimizer": {"lr": 1e-4, "kind": "adamw_8bit"}, "optimizer_steps": 2}},
        "auto": {"update": {"optimizer": {"lr": "auto"}}},
        "subset_two_steps": {"rollout": {"trained": {"kind": "subset"}}, "update": {"optimizer_steps": 2}},
    }[variant]
    # Before and after an evaluation; where there is none, once.
    last, stops = (4, (1, 3)) if "eval" in sections else (3, (2,))
    straight = finished(tiny_config(tiny_flux, tmp_path / "a", train={"iterations": last}, **sections))
    for stop in stops:
        part = tmp_path / f"b{stop}"
        finished(tiny_config(tiny_flux, part, train={"iterations": stop}, **sections))
        run = {"dir": str(part), "seed": 7, "resume": True}
        again = finished(tiny_config(tiny_flux, part, train={"iterations": last}, run=run, **sections))
        for (name, ours), theirs in zip(weights(again).items(), weights(straight).values(), strict=True):
            assert torch.equal(ours, theirs), name
        assert metrics(part) == metrics(tmp_path / "a")


class After(Callback):
    """Does something after a certain iteration."""

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def after_iteration(self, trainer):
        if trainer.iteration == self.iteration:
            self.act()


def test_training_changes_the_weights_and_the_ratio_starts_at_one(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 3}, update={"optimizer_steps": 2})
    trainer = Trainer.from_config(config)
    before = weights(trainer)
    trainer.run()
    assert any(not torch.equal(before[k], v) for k, v in weights(trainer).items() if k.startswith("model."))
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(line["ratio/first_max_deviation"] == 0 for line in lines)
    assert any(line["ratio/max_deviation"] > 0 for line in lines)


def test_gradients_that_are_switched_off_do_not_stop_training(tiny_flux, tmp_path):
    ours = [train(tiny_config(tiny_flux, tmp_path / "on", train={"iterations": 1}))]
    with torch.no_grad():
        ours.append(train(tiny_config(tiny_flux, tmp_path / "off", train={"iterations": 1})))
    on, off = (result.metrics["grad_norm"] for result in ours)
    assert off == on > 0


@pytest.mark.parametrize("begin", [train, Trainer.from_config])
@pytest.mark.parametrize("given", ["configs/mine.yaml", {"run": {"dir": "mine"}}, None])
def test_what_is_no_config_is_one_line(begin, given):
    with pytest.raises(
        ConfigError, match=r"^config: .* is \w+; give a config, as fastgrpo.load_config\(PATH\) reads it$"
    ):
        begin(given)


def test_a_device_may_be_text(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run")
    assert load_family(config.model, "cpu").device == torch.device("cpu")


def test_float32_statistics_in_bfloat16(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", model={"dtype": "bfloat16"})
    trainer = finished(config)
    assert all(line["ratio/first_max_deviation"] == 0 for line in metrics(tmp_path / "run"))
    assert all(p.dtype == torch.float32 for p in trainer.optimizer.parameters)


def test_activation_checkpointing_changes_no_bit(tiny_flux, tmp_path):
    runs = [
        finished(tiny_config(tiny_flux, tmp_path / str(k), model={"activation_checkpointing": k}))
        for k in ("none", "all", 2)
    ]
    for other in runs[1:]:
        for a, b in zip(weights(runs[0]).values(), weights(other).values(), strict=True):
            assert torch.equal(a, b)


def test_failed_samples_are_masked_and_counted(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", rewards=[{"name": "test_trainer:HalfFails"}])
    finished(config)
    assert [line["samples/failed"] for line in metrics(tmp_path / "run")] == [3, 3]


def test_a_watched_reward_that_fails_spoils_nothing(tiny_flux, tmp_path):
    sections = {"eval": {"every": 1, "images": 4}, "train": {"iterations": 1}}
    watched = {"name": "test_trainer:Raises", "weight": 0.0}
    plain = finished(tiny_config(tiny_flux, tmp_path / "a", **sections))
    spoilt = finished(tiny_config(tiny_flux, tmp_path / "b", rewards=[{"name": "shapes"}, watched], **sections))
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    best, same = (callback_of(t, EvaluationCallback).best for t in (plain, spoilt))
    assert best is not None
    assert same is not None
    assert (same["iteration"], same["score"]) == (best["iteration"], best["score"])
    for (name, ours), theirs in zip(weights(spoilt).items(), weights(plain).values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_reward_that_always_fails_ends_the_run_in_one_line(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", rewards=[{"name": "test_trainer:Raises"}])
    with pytest.raises(UserError, match="no sample of iteration 0 could be scored"):
        train(config)


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, PreemptedError)])
def test_a_signal_leaves_a_checkpoint_that_continues(tiny_flux, tmp_path, number, raised):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 3})
    handler = signal.getsignal(number)
    trainer = Trainer.from_config(config)
    trainer.callbacks.insert(0, After(2, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(raised):
        trainer.run()
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [2]
    assert signal.getsignal(number) is handler
    finished(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})}))
    straight = finished(tiny_config(tiny_flux, tmp_path / "straight", train={"iterations": 3}))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert straight.iteration == 3


def test_a_used_directory_is_not_overwritten(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1})
    finished(config)
    with pytest.raises(UserError, match=r"already holds a run; continue it with run\.resume=true"):
        Trainer.from_config(config)


def test_resume_without_a_checkpoint(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", run={"dir": str(tmp_path / "none"), "resume": True})
    with pytest.raises(UserError, match="holds no checkpoint to continue"):
        Trainer.from_config(config)


def test_resume_with_another_config_names_the_setting(tiny_flux, tmp_path):
    finished(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1}))
    other = tiny_config(
        tiny_flux, tmp_path / "run", run={"dir": str(tmp_path / "run"), "seed": 7, "resume": True}, rollout={"eta": 0.4}
    )
    with pytest.raises(UserError, match=r"rollout differs .*eta: 0\.3 then, 0\.4 now"):
        Trainer.from_config(other)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("suffix", [".safetensors", "index.json", "state.json"])
def test_a_damaged_checkpoint_is_never_loaded(tiny_flux, tmp_path, damage, suffix):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1})
    finished(config)
    store = CheckpointStore.of_run(tmp_path / "run")
    [file] = [p for p in store.path(1).iterdir() if p.name.endswith(suffix)]
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(data) // 2
        file.write_bytes(
            data[:middle] if damage == "truncate" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
    with pytest.raises(UserError, match=r"damaged|not a readable checkpoint"):
        Trainer.from_config(config.model_copy(update={"run": config.run.model_copy(update={"resume": True})}))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_flux, tmp_path, capsys):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 2}, checkpoint={"every": 1})
    done = weights(finished(config))
    store = CheckpointStore.of_run(tmp_path / "run")
    [file] = store.path(2).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    again = Trainer.from_config(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})}))
    assert again.iteration == 1
    assert "damaged (its checksum differs)" in capsys.readouterr().err
    again.run()
    assert store.iterations() == [1, 2]
    assert all(torch.equal(tensor, done[name]) for name, tensor in weights(again).items())


@pytest.mark.parametrize("where", ["gradient", "activation"])
def test_a_nan_skips_the_step_or_the_samples_and_is_counted(tiny_flux, tmp_path, where):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run"))

    def poison(*_):
        return torch.full_like(_[-1], torch.nan) if trainer.iteration == 0 else None

    if where == "gradient":
        trainer.optimizer.parameters[3].register_hook(poison)
    else:
        trainer.family.denoiser.register_forward_hook(
            lambda module, _, out: (out[0] * torch.nan,) if torch.is_grad_enabled() and trainer.iteration == 0 else None
        )
    before = weights(trainer)
    skipped = []

    def compare():
        skipped.append(all(torch.equal(before[k], v) for k, v in weights(trainer).items()))

    trainer.callbacks += [After(1, compare), After(2, compare)]
    trainer.run()
    assert skipped == [True, False]
    assert [line["optimizer_steps/skipped"] for line in metrics(tmp_path / "run")] == [1, 0]
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_a_first_iteration_in_which_nothing_is_learned_goes_on(tiny_flux, tmp_path, monkeypatch):
    """All rewards alike: no optimizer step, and no learning rate of one yet."""
    alike = Scores(np.full(6, 0.5), np.ones(6, dtype=bool))
    monkeypatch.setattr("fastgrpo.rewards.shapes.ShapesReward.score", lambda *_: alike)
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1}))
    before = weights(trainer)
    trainer.run()
    (line,) = metrics(tmp_path / "run")
    assert (line["groups/zero_spread"], line["lr"]) == (1.0, 1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(tiny_flux, tmp_path, monkeypatch):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 3}, checkpoint={"every": 1})
    trainer = Trainer.from_config(config)
    import fastgrpo.checkpoints.store as module

    write, count = module.write_shard, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(UserError, match="No space left on device; the checkpoint of iteration 1 is intact"):
        trainer.run()
    assert [p.name for p in callback_of(trainer, CheckpointCallback).store.directory.iterdir()] == ["000001"]


def test_the_latest_and_the_best_checkpoints_stay(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 5}, checkpoint={"every": 1, "keep": 2})
    trainer = Trainer.from_config(config)
    # Iteration 2 was the best so far, and no later evaluation is better.
    evaluation = EvaluationCallback([])
    evaluation.after_iteration = lambda trainer: evaluation.history.append(
        {"iteration": trainer.iteration, "score": float(trainer.iteration == 2), "rewards": {}}
    )
    evaluation.on_start = lambda trainer: None
    trainer.callbacks.insert(0, evaluation)
    callback_of(trainer, CheckpointCallback).evaluation = evaluation
    trainer.run()
    assert callback_of(trainer, CheckpointCallback).store.iterations() == [2, 4, 5]
