"""The best of N: the exact expectation, the curve of a run and its base, and what `sample --best-of` writes."""

import json
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from support.tiny import tiny_config

from fastgrpo.commands import best_of, evaluate
from fastgrpo.commands import sample as sampling
from fastgrpo.commands.best_of import best_of_n, best_of_run
from fastgrpo.commands.main import main
from fastgrpo.commands.sample import sample_run
from fastgrpo.commands.train import train
from fastgrpo.errors import UserError
from fastgrpo.rewards import Scores


class Redness:
    def score(self, samples, prompts, fps):
        values = samples[:, 0].mean(dim=(1, 2)).double().numpy()
        return Scores(values, np.ones(len(values), bool))


class Blueness:
    def score(self, samples, prompts, fps):
        values = samples[:, 2].mean(dim=(1, 2)).double().numpy()
        return Scores(values, np.ones(len(values), bool))


@pytest.fixture(scope="module")
def run(tiny_flux, tmp_path_factory):
    path = tmp_path_factory.mktemp("best") / "run"
    rewards = [{"name": "test_best_of:Redness"}, {"name": "test_best_of:Blueness", "weight": 0.0}]
    train(tiny_config(tiny_flux, path, train={"iterations": 1}, rewards=rewards))
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expectation_is_that_over_all_subsets(n):
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    brute = [
        np.mean([v[max(subset, key=lambda i, k=k: k[i])] for subset in combinations(range(6), n)])
        for k, v in zip(keys, values, strict=True)
    ]
    assert best_of_n(keys, values, n) == pytest.approx(brute)


def test_ties_share_and_what_has_no_score_is_not_drawn():
    # All choosing scores are equal: the best of any N is any sample.
    assert best_of_n(np.zeros((1, 4)), np.array([[0.0, 1.0, 2.0, 3.0]]), 3) == pytest.approx([1.5])
    keys = np.array([[1.0, np.nan, 2.0]])
    assert best_of_n(keys, np.array([[5.0, 9.0, 7.0]]), 2) == pytest.approx([7.0])
    assert np.isnan(best_of_n(keys, keys, 3)).all()


def test_the_curve_rises_for_what_chooses_and_is_written(run, tmp_path):
    result = best_of_run(run, most=8, prompts=3, out=tmp_path)
    assert result == json.loads((tmp_path / "best-of.json").read_text()) | {"curves": result["curves"]}
    assert result["sizes"] == [1, 2, 4, 8]
    for model in ("base", "tuned"):
        means = result["curves"][model]["test_best_of:Redness"]["mean"]
        assert np.all(np.diff(means) > 0)
        assert set(result["curves"][model]) == {"test_best_of:Redness", "test_best_of:Blueness"}
    with Image.open(tmp_path / "best-of.png") as picture:
        assert picture.width > picture.height


def test_sample_writes_the_best_first_and_they_are_those_of_plain_sampling(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgrpo.commands.sample.CHUNK", 5)
    plain = sample_run(run, ["a red circle", "a blue square"], tmp_path / "all", count=8)
    levels = np.array([np.asarray(Image.open(path))[..., 0].mean() for path in plain]).reshape(2, 8)
    arguments = ["sample", str(run), "a red circle", "a blue square", "--best-of", "8", "--count", "2"]
    assert main([*arguments, "--reward", "test_best_of:Redness", "--out", str(tmp_path / "best")]) == 0
    chosen = json.loads((tmp_path / "best" / "scores.json").read_text())
    assert [entry["samples"] for entry in chosen] == np.argsort(-levels, axis=1)[:, :2].tolist()
    for prompt, entry in enumerate(chosen):
        for rank, sample in enumerate(entry["samples"]):
            best = np.asarray(Image.open(tmp_path / "best" / f"{prompt:04d}-{rank:02d}.png"))
            assert np.array_equal(best, np.asarray(Image.open(plain[8 * prompt + sample])))
    assert main([*arguments[:4], "--reward", "shapes"]) == 2
    assert "--best-of" in capsys.readouterr().err


class Nothing:
    def score(self, samples, prompts, fps):
        return Scores.failed(len(samples))


def test_a_prompt_without_scores_is_named(run, tmp_path):
    with pytest.raises(UserError, match="only 0 of 4 samples of 'a red circle' could be scored"):
        sample_run(run, ["a red circle"], tmp_path, best_of=4, rewards=["test_best_of:Nothing"])


def test_where_nothing_can_be_written_nothing_is_drawn(run, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for module in (evaluate, sampling, best_of):
        monkeypatch.setattr(module, "load_family", lambda *arguments: pytest.fail("the model is loaded"))
    for draw in (
        lambda out: evaluate.evaluate_target(run, evaluate.Request(out=out)),
        lambda out: sampling.sample_run(run, ["a"], out),
        lambda out: best_of.best_of_run(run, 2, out=out),
    ):
        with pytest.raises(UserError, match=r"file.*: cannot be written to: .*; name another directory with --out"):
            draw(file / "x")
