"""The world of words: its prompts and their split, its pictures, and the judges that read them."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.commands.evaluate import Request, evaluate_target
from fastgrpo.commands.pretrain.recipe import WORDS, PretrainConfig
from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import load_settings, validate_settings
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.ocr import equality, similarity
from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline
from fastgrpo.shapes.tiny_parts import UNKNOWN
from fastgrpo.shapes.word_render import MARGIN, glyphs, render_batch
from fastgrpo.shapes.word_world import CATEGORIES, FONTS, HELD_OUT_FONT, all_prompts, split, vocabulary

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain-shapes-words-flux.yaml"


def truth(n, seed=0):
    """Held-out prompts, `n` of them, and a picture [N, 3, H, W] of each."""
    rng = np.random.default_rng(seed)
    held_out = split()[1]
    chosen = [held_out[i] for i in rng.choice(len(held_out), n, replace=False)]
    pictures = torch.from_numpy(render_batch(chosen, rng)).permute(0, 3, 1, 2).float() / 255
    return [Prompt(p.text) for p in chosen], pictures


def test_no_held_out_word_and_not_the_held_out_font_is_trained_on():
    train, held_out = split()
    assert not {p.word for p in train} & {p.word for p in held_out}
    assert HELD_OUT_FONT not in {p.font for p in train}
    assert {p.font for p in held_out if p.category == "new_font"} == {HELD_OUT_FONT}
    assert {p.category for p in all_prompts()} == set(CATEGORIES)
    counts = Counter(p.category for p in held_out)
    assert all(
        counts[c] / sum(p.category == c for p in all_prompts()) == pytest.approx(0.2, abs=0.01) for c in CATEGORIES[:3]
    )
    assert len({p.text for p in all_prompts()}) == len(all_prompts())


def test_tokenizers_spell_what_is_quoted():
    pipeline = build_pipeline(vocabulary(), TinyFluxSizes(text_length=16), seed=0)
    texts = [p.text for p in all_prompts()]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        rows = tokenizer(texts, padding="max_length", max_length=16, truncation=True).input_ids
        assert not any(UNKNOWN in row for row in rows)
        assert len({tuple(row) for row in rows}) == len(texts)
    spelled = pipeline.tokenizer_2.tokenize('a sign that says "B4" in bold mono')
    assert spelled == ["a", "sign", "that", "says", '"', "B", "4", '"', "in", "bold", "mono"]


def test_a_picture_holds_its_whole_word_whatever_the_font():
    for font in FONTS:
        for pixels in (18, 22):
            cover = glyphs("WWWW", font, pixels, 32, 64)
            assert cover.max() > 200
            assert not cover[:, : MARGIN - 1].any()
            assert not cover[:, 1 - MARGIN :].any()
    a, b = (render_batch(all_prompts()[:4], np.random.default_rng(seed)) for seed in (0, 0))
    assert a.shape == (4, 32, 64, 3)
    assert (a == b).all()
    assert (a != render_batch(all_prompts()[:4], np.random.default_rng(1))).any()


def test_reading_lines_alone_reads_every_sign():
    prompts, pictures = truth(24)
    reward = load_reward(RewardSpec(name="ocr", options={"detect": False, "match": "equal", "batch": 16}))
    scores = reward.score(pictures, prompts, None)
    assert scores.components["strict"].mean() >= 0.95
    # Against the neighbour's word, and one by one: the picture is read, and a batch changes nothing.
    assert reward.score(pictures, [*prompts[1:], prompts[0]], None).components["strict"].mean() <= 0.05
    alone = [reward.score(pictures[i : i + 1], prompts[i : i + 1], None).values[0] for i in range(4)]
    assert alone == scores.values[:4].tolist()


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
def test_tesseract_is_a_second_judge():
    prompts, pictures = truth(8)
    scores = load_reward(RewardSpec(name="tesseract", options={"light": True})).score(pictures, prompts, None)
    assert scores.components["strict"].mean() >= 0.6
    assert load_reward(RewardSpec(name="tesseract")).score(pictures[:1], [Prompt("a sign")], None).valid.tolist() == [
        False
    ]


def test_a_judge_whose_prompts_are_chosen_says_what_it_read_of_those_alone():
    prompts, pictures = truth(3)
    kinds = [
        Prompt(p.text, metadata={"kind": kind}) for p, kind in zip(prompts, ("sign", "scene", "sign"), strict=True)
    ]
    spec = RewardSpec(name="ocr", options={"detect": False})
    alone = load_reward(spec).describe(pictures, prompts)  # pyright: ignore[reportAttributeAccessIssue]
    routed = load_reward(spec.model_copy(update={"when": {"kind": ["sign"]}}))
    assert routed.describe(pictures, kinds) == [alone[0], "", alone[2]]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["binary", "composite"])
def test_a_reward_that_stands_over_a_judge_says_what_that_one_read(name):
    from fastgrpo.rewards.failures import FailureLog
    from fastgrpo.rewards.scoring import describe_samples

    prompts, pictures = truth(2)
    judge, mute = {"name": "ocr", "options": {"detect": False}}, {"name": "shapes"}
    options = {
        "binary": [{"of": judge, "threshold": 0.5}, {"of": mute, "threshold": 0.5}],
        "composite": [{"of": [mute, judge], "aggregate": "reward"}, {"of": [mute], "aggregate": "reward"}],
    }[name]
    reads, silent = (load_reward(RewardSpec(name=name, options=chosen)) for chosen in options)
    alone = load_reward(RewardSpec(**judge)).describe(pictures, prompts)  # pyright: ignore[reportAttributeAccessIssue]
    found = describe_samples({"reads": reads, "silent": silent}, FailureLog(print), pictures, prompts)
    assert found == {"reads": alone}


def test_an_evaluation_leaves_out_a_judge_that_is_not_installed_and_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    request = Request(images=2, rewards=[str(CONFIG.parent / "judges" / "words.yaml")], out=tmp_path / "out")
    summary = evaluate_target(CONFIG.parent / "shapes-words-flux.yaml", request, said.append)
    assert said[0].startswith("left out: rewards.tesseract: the program tesseract is not installed")
    assert [spec["name"] for spec in summary["scored_by"]] == ["ocr"]
    assert "ocr" in summary["base"]["rewards"]
    with pytest.raises(UserError, match=r"rewards\.tesseract"):
        evaluate_target(CONFIG.parent / "shapes-words-flux.yaml", Request(images=2, rewards=["tesseract"]), said.append)


def test_without_the_program_tesseract_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install tesseract-ocr"):
        load_reward(RewardSpec(name="tesseract"))


@pytest.mark.parametrize(
    "wanted, read, contains, equal",
    [
        ("blue", "blue", 1, 1),
        ("blue", "blues", 1, 0.8),
        ("blue", "bue", 0.75, 0.75),
        ("blue", "", 0, 0),
        ("ab", "xyz", 0, 0),
    ],
)
def test_how_much_of_a_text_was_read(wanted, read, contains, equal):
    assert similarity(wanted, read) == contains
    assert equality(wanted, read) == pytest.approx(equal)


def test_prompts_and_recipe_name_the_world():
    assert {p.metadata["category"] for p in load_prompts("words:heldout")} == set(CATEGORIES)
    assert all(p.text.startswith('a sign that says "') for p in load_prompts("words:train:word"))
    recipe = load_settings(PretrainConfig, CONFIG)
    assert recipe.world.module is WORDS.module
    assert "new_font" not in recipe.world.categories
    config = recipe.evaluation("shapes:flux", 3.5)
    assert (config.model.height, config.model.width) == (32, 64)
    with pytest.raises(ConfigError, match="captions: unknown world 'wards'; did you mean 'words'"):
        validate_settings(PretrainConfig, {**recipe.model_dump(), "captions": "wards"})


def test_a_render_is_what_the_pool_encodes():
    recipe = load_settings(PretrainConfig, CONFIG)
    pictures = recipe.world.render(split()[0][:2], np.random.default_rng(0), recipe.checked_sizes)
    assert pictures.shape == (2, 3, 32, 64)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert Image.fromarray(render_batch(split()[0][:1], np.random.default_rng(0))[0]).size == (64, 32)


def test_an_evaluation_says_what_a_judge_read(tmp_path):
    from fastgrpo.commands.report.pictures import Column, _seen
    from fastgrpo.evaluation.heldout import Evaluation, record
    from fastgrpo.rewards.failures import FailureLog
    from fastgrpo.rewards.scoring import describe_samples

    class Mute:
        def describe(self, samples, prompts):
            raise RuntimeError("no voice")

    prompts, pictures = truth(3)
    said = []
    rewards = {"ocr": load_reward(RewardSpec(name="ocr", options={"detect": False})), "mute": Mute()}
    describe = partial(describe_samples, rewards, FailureLog(said.append))
    seen = describe(pictures, prompts)
    assert list(seen) == ["ocr"]
    assert [text.strip("“”") in p.text for text, p in zip(seen["ocr"], prompts, strict=True)] == [True] * 3
    assert any("mute" in line and "no voice" in line for line in said)
    record(Evaluation(prompts, {"ocr": np.ones(3)}, pictures), tmp_path, 0, [2, 0], describe=describe)
    evaluation = json.loads((tmp_path / "eval" / "000000.json").read_text())
    assert evaluation["seen"] == {"ocr": [seen["ocr"][2], seen["ocr"][0]]}
    column = Column("after", evaluation)
    assert _seen(column, 0) == f"<p>ocr: {seen['ocr'][2]}</p>"
    assert _seen(column, 2) == ""
