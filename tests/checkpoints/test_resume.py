"""Run directories: one process at a time, claimed by what is valid, continued by what a checkpoint says of its run."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from support.runs import callback_of, finished, metrics
from support.tiny import tiny_config

from fastgrpo.checkpoints.resume import compare, digest_of
from fastgrpo.checkpoints.run_lock import RunLock
from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.commands.runs import open_run
from fastgrpo.config import load_config, validate
from fastgrpo.config.sections import dump_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError, RunPausedError, UserError
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.trainer import Trainer

HOLD = """
import sys
import time
from pathlib import Path
from fastgrpo.errors import UserError
from fastgrpo.checkpoints.run_lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]))
except UserError as error:
    print(error)
    sys.exit(2)
print("held", flush=True)
sys.stdin.readline()
"""


def holder(folder):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_second_process_is_told_who_holds_a_directory_and_a_kill_frees_it(tmp_path):
    first = holder(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = holder(tmp_path)
    said, _ = second.communicate("")
    assert second.returncode == 2
    assert f"{tmp_path} is in use by process {first.pid} of host {os.uname().nodename} since 20" in said
    with pytest.raises(UserError, match=f"in use by process {first.pid} "):
        RunLock(tmp_path)
    first.kill()
    first.wait()
    lock = RunLock(tmp_path)
    # The same process may ask twice, and has it until it lets both go.
    again = RunLock(tmp_path)
    lock.release()
    lock.release()
    assert "in use by process" in holder(tmp_path).communicate("")[0]
    again.release()
    assert holder(tmp_path).communicate("\n")[0] == "held\n"


def test_a_run_holds_its_directory_until_it_ends(tiny_flux, tmp_path):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1}))
    assert "in use by process" in holder(tmp_path / "run").communicate("")[0]
    trainer.run()
    assert holder(tmp_path / "run").communicate("\n")[0] == "held\n"


def test_a_failed_start_does_not_use_a_directory(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1})

    def broken(*_):
        raise UserError("model.path: the weights are not there")

    for resume, error in ((False, "weights"), (False, "weights"), (True, "holds no checkpoint"), ("auto", "weights")):
        run = config.run.model_copy(update={"resume": resume})
        with pytest.raises(UserError, match=error):
            Trainer.from_config(config.model_copy(update={"run": run}), broken)
    finished(config)
    assert len(metrics(tmp_path / "run")) == 1


def test_metrics_without_a_checkpoint_name_a_way_on(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"iteration": 0}\n')
    with pytest.raises(ConfigError, match=r"left no checkpoint; run\.resume=auto starts anew"):
        Trainer.from_config(config)
    finished(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})}))
    assert "reward/mean" in metrics(tmp_path / "run")[0]


WORDS = ["off", "yes", "no", "1:30", "0x10", "1_000", "1e3", "null", "~", "2026-01-01", "0b1", "010", "=", "<<", "y"]


@pytest.mark.parametrize("word", WORDS)
def test_an_unchanged_config_is_unchanged_whatever_its_words(tiny_flux, tmp_path, word):
    config = tiny_config(
        tiny_flux, tmp_path, model={"negative_prompt": word},
        rewards=[{"name": "shapes", "label": word, "when": {"a": [word]}, "options": {"x": word}}],
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_settings(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    compare(json.loads(json.dumps(config.model_dump(mode="json"))), again)
    other = tiny_config(
        tiny_flux, tmp_path, model={"negative_prompt": word + "x"},
        rewards=[{"name": "shapes", "label": word, "when": {"a": [word]}, "options": {"x": word}}],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"model differs .*negative_prompt"):
        compare(config.model_dump(mode="json"), other)


def test_two_spellings_of_a_path_are_one(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to("models")

    def at(path):
        return tiny_config(tiny_flux, tmp_path, model={"path": path}, rewards=[{"name": "clip", "path": path}])

    before = at("./models").model_dump(mode="json")
    for path in ("models", "models/", f"{tmp_path}/models", "link", "~/models"):
        compare(before, at(path))
    with pytest.raises(ConfigError, match=r"model differs .*path: './models' then, 'model' now"):
        compare(before, at("model"))


def test_a_checkpoint_of_an_unknown_setting_is_one_line(tiny_flux):
    config = tiny_config(tiny_flux)
    with pytest.raises(ConfigError, match=r"not one of this version of fastgrpo \(rollout.gone: unknown setting"):
        compare({**config.model_dump(mode="json"), "rollout": {"gone": 1}}, config)


def with_prompts(tiny_flux, folder, lines, iterations, resume: bool | str = "auto", **sections):
    (folder / "prompts.txt").write_text("\n".join(lines))
    return tiny_config(
        tiny_flux, train={"iterations": iterations}, run={"dir": str(folder / "run"), "seed": 7, "resume": resume},
        prompts={"train": str(folder / "prompts.txt")}, rewards=[{"name": "clip", "path": "shapes:clip"}], **sections,
    )  # fmt: skip


def test_prompts_may_follow_and_not_change(tiny_flux, tmp_path, capsys):
    lines = ["a red circle", "a blue square", "a green circle"]
    finished(with_prompts(tiny_flux, tmp_path, lines, 1, False))
    with pytest.raises(ConfigError, match=r"prompts.train: .*prompts.txt has other prompts than"):
        Trainer.from_config(with_prompts(tiny_flux, tmp_path, ["a red square", *lines[1:]], 2))
    with pytest.raises(ConfigError, match="has other prompts than"):
        Trainer.from_config(with_prompts(tiny_flux, tmp_path, lines[:2], 2))
    finished(with_prompts(tiny_flux, tmp_path, [*lines, "a red square"], 2))
    assert "1 more prompts than at the checkpoint" in capsys.readouterr().err
    # A file of the same prompts elsewhere is the same.
    (tmp_path / "prompts.txt").rename(tmp_path / "other.txt")
    config = with_prompts(tiny_flux, tmp_path, [*lines, "a red square"], 3)
    moved = config.prompts.model_copy(update={"train": str(tmp_path / "other.txt")})
    finished(config.model_copy(update={"prompts": moved}))


def test_the_digest_is_of_everything_that_a_prompt_says(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"1")
    prompt = Prompt("x", "y", str(picture), {"b": [1], "a": 2})
    digest = digest_of([prompt])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"2")
    assert digest_of([Prompt("x", "y", str(tmp_path / "sub" / "a.png"), {"a": 2, "b": [1]})]) == digest
    others = [Prompt("x", "z", prompt.image, prompt.metadata), Prompt("x", "y", None, prompt.metadata), Prompt("x")]
    picture.write_bytes(b"22")
    assert digest not in {digest_of([other]) for other in [prompt, *others]}


@pytest.mark.parametrize("damage", ["remove", "break"])
def test_a_run_without_its_config_is_what_its_checkpoint_says(tiny_flux, tmp_path, damage):
    run = tmp_path / "run"
    config = tiny_config(tiny_flux, run, train={"iterations": 1})
    finished(config)
    written = run / "config.yaml"
    written.unlink() if damage == "remove" else written.write_text("run: {dir: [")
    assert open_run(run)[0] == config
    other = validate({**config.model_dump(mode="json"), "run": {"dir": str(run), "seed": 8, "resume": "auto"}})
    with pytest.raises(ConfigError, match=r"run\.seed differs"):
        Trainer.from_config(other)
    finished(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})}))
    assert load_config(written).run.seed == 7


def test_weights_that_are_not_finite_are_named_and_not_continued(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 3}, checkpoint={"every": 1, "keep": 1})
    trainer = Trainer.from_config(config)

    class Poison(Callback):
        def after_iteration(self, trainer):
            if trainer.iteration == 2:
                trainer.optimizer.parameters[0].data.fill_(float("nan"))

    trainer.callbacks.insert(0, Poison())
    with pytest.raises(UserError, match=r"weights are not finite: \S+; the last finite checkpoint is of iteration 1"):
        trainer.run()
    store = CheckpointStore.of_run(tmp_path / "run")
    assert store.last_finite() == 1
    with pytest.raises(UserError, match=r"weights are not finite: model/\S+.*remove the checkpoints after 000001"):
        Trainer.from_config(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})}))


def test_the_best_checkpoint_is_saved_or_said_to_be_missing(tiny_flux, tmp_path, monkeypatch):
    config = tiny_config(
        tiny_flux, tmp_path / "run", train={"iterations": 4}, checkpoint={"every": 0, "keep": 1},
        eval={"every": 1, "images": 4},
    )  # fmt: skip
    trainer = Trainer.from_config(config)
    evaluation, scores = callback_of(trainer, EvaluationCallback), iter([0.1, 0.2, 0.9, 0.3, 0.2])
    evaluate = evaluation.evaluate

    def fixed(trainer):
        evaluate(trainer)
        evaluation.history[-1]["score"] = next(scores)

    monkeypatch.setattr(evaluation, "evaluate", fixed)
    trainer.run()
    store = CheckpointStore.of_run(tmp_path / "run")
    assert store.iterations() == [2, 4]
    assert open_run(tmp_path / "run", "best")[2] == 2
    assert open_run(tmp_path / "run")[2] == 4
    # The best so far stays, whether or not evaluations go on.
    on = {"eval": {"every": 0}, "train": {"iterations": 5}, "run": {**config.run.model_dump(), "resume": True}}
    assert len(finished(validate({**config.model_dump(), **on})).result().evaluations) == 5
    assert store.iterations() == [2, 5]
    assert open_run(tmp_path / "run", "best")[2] == 2
    store.path(2).rename(tmp_path / "away")
    with pytest.raises(UserError, match="iteration 2 scored best, and its checkpoint is not there"):
        open_run(tmp_path / "run", "best")


def stored(folder, best):
    store = CheckpointStore.of_run(folder)
    (folder).mkdir()
    (folder / "config.yaml").write_text("x")
    store.save(3, {}, {"best_iteration": best}, 2)


@pytest.mark.parametrize("limit", [2, None])
def test_steps_that_are_all_skipped_pause_the_run(tiny_flux, tmp_path, limit):
    settings = {"iterations": 5, "max_skipped_steps": limit}
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", train=settings))
    trainer.optimizer.parameters[3].register_hook(lambda grad: torch.full_like(grad, torch.nan))
    if limit is None:
        trainer.run()
        assert len(metrics(tmp_path / "run")) == 5
        return
    with pytest.raises(RunPausedError, match=r"train\.max_skipped_steps: 2 optimizer steps .*and weights are finite"):
        trainer.run()
    # The third iteration's samples were rolled out, and its update never came.
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [2]
    assert [line["optimizer_steps/skipped"] for line in metrics(tmp_path / "run")] == [1, 1]


@pytest.mark.parametrize("best, message", [(0, "the base model scored best"), (None, "no evaluation has said yet")])
def test_the_best_is_never_another_one(tmp_path, best, message):
    stored(tmp_path / "run", best)
    with pytest.raises(UserError, match=message):
        open_run(tmp_path / "run", "best")


def test_an_error_waits_for_the_checkpoint_that_is_being_written(tiny_flux, tmp_path, monkeypatch):
    import fastgrpo.checkpoints.store as module

    write = module.write_shard

    def slowly(*arguments):
        time.sleep(2)
        write(*arguments)

    class Fails(Callback):
        def before_iteration(self, trainer):
            if trainer.iteration == 1:
                raise RuntimeError("a picture that cannot be read")

    monkeypatch.setattr(module, "write_shard", slowly)
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", checkpoint={"every": 1}))
    trainer.callbacks.insert(0, Fails())
    with pytest.raises(RuntimeError, match="a picture"):
        trainer.run()
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [1]
    assert holder(tmp_path / "run").communicate("\n")[0] == "held\n"
