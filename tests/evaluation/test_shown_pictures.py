"""Which pictures are shown of a comparison, in which order, and what stands under them."""

import math

import numpy as np
import torch
from PIL import Image

from fastgrpo.evaluation.compare import fair_sample, marks, most_changed, shown_columns
from fastgrpo.observe.side_by_side import RIGHT, WRONG, Labels, write_side_by_side


def test_what_became_right_or_wrong_comes_first_and_a_gain_before_an_equal_loss():
    base = {"r": [0.2, 0.2, 0.9, 0.5, 0.1], "r.strict": [0.0, 0.0, 1.0, 1.0, 0.0], "r.other": [0, 9, 0, 0, 0]}
    tuned = {"r": [0.3, 0.9, 0.4, 0.5, None], "r.strict": [0.0, 1.0, 0.0, 1.0, None], "r.other": [5, 0, 0, 0, 0]}
    assert most_changed(base, [tuned], range(5)) == [1, 2, 0, 3, 4]
    assert most_changed(base, [tuned, tuned], [3, 0]) == [0, 3]
    assert most_changed({}, [{}], range(3)) == [0, 1, 2]


def test_a_sample_has_the_shares_of_all_and_takes_the_first_of_each():
    rng = np.random.default_rng(0)
    change = rng.permutation([1.0] * 120 + [-1.0] * 60 + [0.0] * 60)
    base = {"r.strict": np.where(change > 0, 0.0, 1.0)}
    tuned = {"r.strict": base["r.strict"] + change}
    shown = fair_sample(base, tuned, 24)
    assert [change[place] for place in shown] == [1.0] * 12 + [-1.0] * 6 + [0.0] * 6
    for sign, count in ((1, 12), (-1, 6), (0, 6)):
        assert set(np.flatnonzero(change == sign)[:count]) <= set(shown)
    assert len(set(fair_sample(base, tuned, 23))) == 23
    assert sorted(fair_sample(base, tuned, 500)) == list(range(240))


def test_marks_are_of_what_tells_right_from_wrong_else_of_the_rewards():
    assert marks({"a": [0.5], "a.strict": [1.0]}, 0) == [("a.strict", 1.0)]
    assert marks({"a": [0.5], "b": [math.nan], "c": [None], "a.part": [3.0]}, 0) == [("a", 0.5)]
    assert marks({"a": []}, 0) == []


def colors(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(color) for color in picture.reshape(-1, 3).tolist()}


def test_a_reward_whose_name_has_dots_is_shown_as_any_other():
    names = ["mine.py:Bright", "mine.py:Bright.mean", "shapes", "shapes.strict", "shapes.color", "shapes.v2"]
    assert shown_columns(names) == ["mine.py:Bright", "shapes", "shapes.strict"]
    base, tuned = {"mine.py:Bright": [0.0, 0.5, 0.5]}, {"mine.py:Bright": [0.0, 0.1, 0.9]}
    assert fair_sample(base, tuned, 3) == [2, 1, 0]
    assert marks(tuned, 1) == [("mine.py:Bright", 0.1)]


def test_pairs_stand_side_by_side_with_their_marks(tmp_path):
    before, after = torch.zeros(5, 3, 32, 32), torch.ones(5, 3, 32, 32)
    labels = [Labels("a prompt of several words that is long", [("✗", False), ("✓", True)])] * 5
    write_side_by_side({"before": before, "after": after}, labels, tmp_path / "pairs.png")
    sheet = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    assert (sheet == 0).all(axis=-1).sum() == 5 * 96 * 96
    assert {RIGHT, WRONG} <= colors(sheet)
    three = {"source": after, "before": before, "after": before}
    write_side_by_side(three, [Labels("one", [("", None), ("0.12", None), ("0.34", None)])], tmp_path / "one.png")
    assert (np.asarray(Image.open(tmp_path / "one.png").convert("RGB")) == 0).all(axis=-1).sum() == 2 * 96 * 96
    assert not {RIGHT, WRONG} & colors(np.asarray(Image.open(tmp_path / "one.png").convert("RGB")))


def test_of_videos_frames_stand_in_rows(tmp_path):
    before = torch.zeros(1, 3, 5, 32, 32)
    labels = [Labels("moves", [("✗", False), ("✓", True)])]
    write_side_by_side({"before": before, "after": before + 1}, labels, tmp_path / "pairs.png")
    sheet = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    black = (sheet == 0).all(axis=-1)
    assert black.sum() == 64 * 5 * 64
    assert black.any(axis=0).sum() == 5 * 64
