"""Twenty typical mistakes: each ends with exit code 2 and one line, which names the setting that was meant."""

import pytest
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.config import dump

TRAIN = ("train", "c.yaml")
MISTAKES = {
    "the learning rate's section": ((*TRAIN, "update.lr=1e-5"), "did you mean 'update.optimizer.lr'?"),
    "no section at all": ((*TRAIN, "lr=1e-5"), "did you mean 'update.optimizer.lr'?"),
    "another trainer's name": ((*TRAIN, "num_generations=8"), "did you mean 'rollout.group_size'?"),
    "a typo in a section": ((*TRAIN, "trian.iterations=3"), "trian: unknown setting; did you mean 'train'?"),
    "a typo in a setting": ((*TRAIN, "rollout.group_sise=4"), "did you mean 'group_size'?"),
    "a typo in a value": ((*TRAIN, "rollout.sampler=dancesde"), "did you mean 'dance_sde'?"),
    "a dtype's short name": ((*TRAIN, "model.dtype=bf16"), "model.dtype: 'bf16' is not valid"),
    "a word for a number": ((*TRAIN, "train.iterations=ten"), "it should be a whole number"),
    "an unknown family": ((*TRAIN, "model.family=fluxx"), "did you mean 'flux'?"),
    "a sampler of other models": ((*TRAIN, "rollout.sampler=ddim"), "rollout.sampler: 'ddim' does not sample"),
    "a missing model": ((*TRAIN, "model.path=/no/such/place"), "model.path: there is no directory '/no/such/place'"),
    "a missing prompt file": ((*TRAIN, "prompts.train=promts.txt"), "did you mean 'prompts.txt'?"),
    "a missing config": (("train", "cc.yaml"), "did you mean 'c.yaml'?"),
    "an unknown reward": ((*TRAIN, "rewards.0.name=shape"), "did you mean 'shapes'?"),
    "a reward's missing class": ((*TRAIN, "rewards.0.name=mine.py:Rewrad"), "did you mean 'Reward'?"),
    "weights that are a pickle": (
        (*TRAIN, "rewards=[{name: hps, path: w.pt}]"), "fastgrpo convert-reward w.pt OUT"
    ),
    "a size that the VAE does not take": ((*TRAIN, "model.height=33"), "model.height: 33 is not a multiple of 8"),
    "evaluations without prompts": ((*TRAIN, "eval.every=5", "prompts.heldout=null"), "eval.every: needs"),
    "a window beyond the last step": ((*TRAIN, "rollout.trained.size=9"), "rollout.trained: the window of 9"),
    "samples that do not divide": ((*TRAIN, "update.optimizer_steps=4"), "update.optimizer_steps: 4 does not divide"),
    "a wrong rank count": ((*TRAIN, "parallel.context=2"), "parallel: replicate 1 × shard auto × context 2 needs"),
    "nothing to resume": ((*TRAIN, "run.resume=true"), "run.resume"),
    "a GPU that is not known": (("plan", "c.yaml", "--gpu", "h1000"), "did you mean 'h100'?"),
    "a folder that is no run": (("export", "empty", "out"), "empty: not a run directory"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, meant", MISTAKES.values(), ids=MISTAKES)
def test_a_typical_mistake_is_one_line_with_what_was_meant(tiny_flux, tmp_path, monkeypatch, capsys, arguments, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(dump(tiny_config(tiny_flux, tmp_path / "run")))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "mine.py").write_text("class Reward:\n    def score(self, samples, prompts, fps): ...\n")
    (tmp_path / "empty").mkdir()
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert meant in line
    assert said.out == ""
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_there_are_twenty():
    assert len(MISTAKES) >= 20
