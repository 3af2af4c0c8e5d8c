"""Prompt sources, what they say about a bad line, and the sampler."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastgrpo.data import Prompt, available, grammar, load_prompts
from fastgrpo.data.prompts import open_image, open_pictures
from fastgrpo.data.samplers import PromptSampler, SpreadSampler
from fastgrpo.errors import ConfigError, UserError


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_text_is_one_prompt_a_line(write):
    source = write("p.txt", "\ufeffa red circle\n\n  two squares \r\na cross")
    assert load_prompts(source) == [Prompt("a red circle"), Prompt("two squares"), Prompt("a cross")]


def test_lines_may_end_as_on_any_system(write):
    both = [Prompt("a red\x0bcircle"), Prompt("two\u2028squares")]
    for end in ("\n", "\r\n", "\r"):
        assert load_prompts(write("p.txt", end.join([both[0].text, "", both[1].text, ""]))) == both
        assert load_prompts(write("p.jsonl", end.join(json.dumps({"prompt": p.text}) for p in both))) == both
        assert load_prompts(write("p.csv", end.join(["prompt", *(p.text for p in both)]))) == both


def test_a_home_directory_is_expanded(write, tmp_path, monkeypatch):
    write("p.jsonl", '{"prompt": "x", "image": "~/first.png"}')
    write("first.png", b"png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_prompts("~/p.jsonl") == [Prompt("x", image=str(tmp_path / "first.png"))]


@pytest.mark.parametrize("source", ["a\0b.txt", "x" * 5000 + ".jsonl", "~nobody-has-this-name/x.csv"])
def test_a_name_that_no_file_can_have_is_one_line(source):
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        load_prompts(source)


def test_a_picture_is_turned_as_diffusers_turns_it(tmp_path):
    diffusers = pytest.importorskip("diffusers.utils")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = picture.getexif()
        exif[0x0112] = orientation
        path = str(tmp_path / f"{orientation}.png")
        picture.save(path, exif=exif)
        opened = open_image(path)
        assert opened.size == ((8, 16) if orientation > 4 else (16, 8))
        assert np.array_equal(np.asarray(opened), np.asarray(diffusers.load_image(path)))


def test_pictures_that_cannot_be_read_are_one_line_each(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "damaged.png").write_bytes(whole[:40] + b"\0" * 30 + whole[70:])
    Image.new("L", (100, 100)).save(tmp_path / "huge.png")
    Image.new("P", (10, 20)).save(tmp_path / "palette.gif")
    Image.new("I;16", (10, 20), 40000).save(tmp_path / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)
    paths = {p.name: str(p) for p in tmp_path.iterdir()}
    sizes, problems = open_pictures([Prompt("x", image=path) for path in paths.values()] * 2)
    assert sizes == {paths["whole.png"]: (64, 64), paths["palette.gif"]: (10, 20)}
    assert len(problems) == 5
    assert all("\n" not in line for line in problems)
    words = {
        "cut.png": "cannot read the image: ", "text.png": "cannot read the image: not a picture",
        "damaged.png": "cannot read the image: ", "huge.png": "the image has more than 9,000 pixels, PIL's limit",
        "deep.png": "cannot read the image: its pixels are I;16, of more than 8 bits",
    }  # fmt: skip
    for name, said in words.items():
        assert [line for line in problems if line.startswith(f"{paths[name]}: {said}")]


def test_jsonl_and_csv_give_the_same_prompts(write, tmp_path):
    (tmp_path / "first.png").write_bytes(b"png")
    jsonl = write(
        "p.jsonl",
        '{"prompt": "a \\"red\\" circle", "negative_prompt": "blur", "image": "first.png", "tag": "colors"}\n\n'
        '{"prompt": "two\\nsquares", "tag": "counting"}\n',
    )
    table = write(
        "p.csv",
        'prompt,negative_prompt,image,tag\n"a ""red"" circle",blur,first.png,colors\n"two\nsquares",,,counting\n',
    )
    prompts = load_prompts(jsonl)
    assert prompts == load_prompts(table)
    assert prompts[0] == Prompt('a "red" circle', "blur", str(tmp_path / "first.png"), {"tag": "colors"})
    assert prompts[1] == Prompt("two\nsquares", None, None, {"tag": "counting"})
    assert len(set(prompts)) == 2
    assert load_prompts(write("p.csv", 'prompt, image, tag\n"a, b", first.png, 1\n')) == [
        Prompt("a, b", None, str(tmp_path / "first.png"), {"tag": "1"})
    ]


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("p.txt", b"fine\nna\xefve\n", 2, "not UTF-8 text"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": }\n', 2, "not valid JSON"),
        ("p.jsonl", '\n\n["x"]\n', 3, "should be an object"),
        ("p.jsonl", '{"prompt": "x"}\n{"text": "x"}\n', 2, "no 'prompt' among text"),
        ("p.jsonl", '{"prompt": " "}\n', 1, "'prompt' should be text, not ' '"),
        ("p.jsonl", '{"prompt": "x", "negative_prompt": 3}\n', 1, "'negative_prompt' should be text, not 3"),
        ("p.jsonl", '{"prompt": "x", "image": "none.png"}\n', 1, "no such file"),
        ("p.jsonl", "[" * 100_000, 1, "not valid JSON"),
        ("p.jsonl", '{"prompt": "x"}\r{"prompt": 3}\r', 2, "'prompt' should be text, not 3"),
        ("p.jsonl", '{"prompt": ["a", "b"]}', 1, "'prompt' should be text, not ['a', 'b']"),
        ("p.jsonl", '{"prompt": "a \\ud83d square"}', 1, "half of a character"),
        ("p.jsonl", '{"prompt": "a", "tag": {"x": ["\\udc00"]}}', 1, "half of a character"),
        ("p.txt", b"fine\rna\xefve\r", 2, "not UTF-8 text"),
        ("p.csv", "prompt,tag\rx,1\r,2\r", 3, "'prompt' should be text"),
        ("p.csv", "text,tag\nx,y\n", 1, "no column 'prompt' among the columns text, tag"),
        ("p.csv", "prompt,tag,tag\nx,y,z\n", 1, "named twice"),
        ("p.csv", 'prompt,tag\n"x\ny",1\nz\n', 4, "has not 2 fields"),
        ("p.csv", "prompt\nx,y\n", 2, "has not 1 fields"),
        ("p.csv", 'prompt,tag\nx,"y', 2, "not valid CSV"),
        ("p.csv", "prompt,tag\nx,1\n,2\n", 3, "'prompt' should be text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write, name, content, line, words):
    source = write(name, content)
    with pytest.raises(ConfigError) as caught:
        load_prompts(source)
    message = str(caught.value)
    assert message.startswith(f"{source}:{line}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "source, words",
    [
        ("none.txt", "cannot read the prompts: No such file or directory"),
        (
            "prompts.parquet",
            "unknown prompt source; it should be a file (.csv, .jsonl, .txt), or begin with editing:, ",
        ),
        ("shape:train", "unknown prompt source; did you mean 'shapes:'? it should be a file"),
        ("shapes:held_out", "did you mean 'shapes:heldout'?"),
    ],
)
def test_an_unknown_source_is_refused(source, words):
    with pytest.raises(ConfigError) as caught:
        load_prompts(source)
    assert words in str(caught.value)


def test_sources_are_listed():
    assert available() == [".csv", ".jsonl", ".txt", "editing:", "hf:", "moving:", "set:", "shapes:", "words:"]


@pytest.mark.parametrize(
    "name, source, called_with",
    [("animals", "animals:6:small", "6:small"), (".parquet", "folder/x.Parquet", "folder/x.Parquet")],
    ids=["kind", "suffix"],
)
def test_a_source_of_a_package_is_called_with_what_follows_its_name(tmp_path, monkeypatch, name, source, called_with):
    (tmp_path / "zoo.py").write_text(
        "from fastgrpo.data import Prompt\n"
        "def source(spec):\n    return (Prompt(text) for text in [spec])\n"
        "def wrong(spec):\n    return ['a cat']\n"
    )
    folder = tmp_path / "zoo-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[fastgrpo.prompts]\n{name} = zoo:source\nwrong = zoo:wrong\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_prompts(source) == [Prompt(called_with)]
    assert {"wrong:", name if name.startswith(".") else f"{name}:"} <= set(available())
    with pytest.raises(ConfigError, match=r"^wrong:1: gives str, not fastgrpo\.data\.prompts\.Prompt"):
        load_prompts("wrong:1")


def test_a_misspelt_file_gets_its_nearest_match(write):
    write("animals.txt", "a cat")
    with pytest.raises(ConfigError, match=r"did you mean 'animals\.txt'\?"):
        load_prompts(write("dummy.txt", "x").replace("dummy", "animal"))


def test_a_file_without_prompts_is_refused(write):
    with pytest.raises(ConfigError, match="holds no prompts"):
        load_prompts(write("p.txt", "\n \n"))


def test_the_embedded_world_has_disjoint_prompts_with_their_category():
    train, heldout = load_prompts("shapes:train"), load_prompts("shapes:heldout")
    assert not {p.text for p in train} & {p.text for p in heldout}
    for prompts in (train, heldout):
        counts = Counter(p.metadata["category"] for p in prompts)
        assert sorted(counts.values()) == [160] * 6


def test_a_dataset_gives_its_column_and_plain_metadata(write, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "data").mkdir()
    write("data/train.jsonl", '{"caption": "a cat", "source": "web", "box": [1, 2]}\n')
    assert load_prompts(f"hf:{tmp_path}/data:train:caption") == [Prompt("a cat", metadata={"source": "web"})]
    with pytest.raises(ConfigError, match=r"no column 'captions'; did you mean 'caption'\?"):
        load_prompts(f"hf:{tmp_path}/data:train:captions")
    with pytest.raises(ConfigError, match="split 'test'"):
        load_prompts(f"hf:{tmp_path}/data:test:caption")


def test_a_missing_datasets_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'datasets'; .*fastgrpo\[datasets\]"):
        load_prompts("hf:someone/prompts")


def test_an_epoch_uses_each_prompt_once_and_every_epoch_has_another_order():
    sampler = PromptSampler(count=12, per_iteration=4, seed=3)
    epochs = [np.concatenate([sampler.at(3 * e + i) for i in range(3)]) for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], PromptSampler(12, 4, seed=4).at(0))


def test_an_iteration_is_a_pure_function_of_seed_and_number():
    forward = PromptSampler(10, 4, seed=0)
    seen = [forward.at(i) for i in range(20)]
    for i in reversed(range(20)):
        assert np.array_equal(PromptSampler(10, 4, seed=0).at(i), seen[i])
        assert np.array_equal(forward.at(i), seen[i])
    assert seen[0].dtype == np.int64


def test_prompts_of_an_iteration_are_distinct_and_none_is_forgotten():
    sampler = PromptSampler(count=11, per_iteration=4, seed=0)
    drawn = [sampler.at(i) for i in range(400)]
    assert all(len(set(d)) == 4 for d in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=11)
    assert counts.min() > 0.8 * counts.mean()


def test_fewer_prompts_than_an_iteration_takes_are_repeated_evenly():
    drawn = PromptSampler(count=3, per_iteration=8, seed=0).at(7)
    assert drawn.shape == (8,)
    assert sorted(np.bincount(drawn, minlength=3)) == [2, 3, 3]


def test_what_a_caller_does_to_a_draw_does_not_reach_the_next():
    sampler = PromptSampler(4, 4, seed=0)
    first = sampler.at(0)
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(sampler.at(0), expected)


def test_prompts_of_wide_spread_are_drawn_more_often_and_none_is_forgotten():
    sampler = SpreadSampler(count=40, per_iteration=8, seed=0)
    sampler.observe(np.arange(40), np.where(np.arange(40) < 20, 0.0, 0.3))
    drawn = np.concatenate([sampler.at(i) for i in range(600)])
    counts = np.bincount(drawn, minlength=40)
    assert all(len(set(sampler.at(i))) == 8 for i in range(50))
    assert counts[20:].min() > 2 * counts[:20].max()
    assert counts.min() > 0
    assert np.array_equal(sampler.at(5), sampler.at(5))
    assert not np.array_equal(sampler.at(5), sampler.at(6))


def test_the_spread_follows_what_is_observed_and_a_group_without_scores_changes_nothing():
    sampler = SpreadSampler(count=9, per_iteration=2, seed=0)
    sampler.observe(np.array([3, 4]), np.array([0.4, np.nan]))
    sampler.observe(np.array([3]), np.array([0.2]))
    assert sampler.spread[3] == pytest.approx(0.3)
    assert np.isnan(sampler.spread[4])


def test_vbenchs_prompts_are_those_of_its_package(tmp_path, monkeypatch):
    """Two of the list, in its form. The package itself is never imported."""
    with pytest.raises(UserError, match=r"^set:vbench: its prompts are in the package 'vbench'; pip install --no-deps"):
        load_prompts("set:vbench")
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench/__init__.py").write_text("raise SystemExit")
    listed = [
        {"prompt_en": "a person clapping", "dimension": ["human_action"]},
        {"prompt_en": "a red car", "dimension": ["color", "object_class"], "auxiliary_info": {"color": "red"}},
    ]
    (tmp_path / "vbench/VBench_full_info.json").write_text(json.dumps(listed))
    monkeypatch.syspath_prepend(tmp_path)
    clapping, car = load_prompts("set:vbench")
    assert (clapping.text, clapping.metadata["category"]) == ("a person clapping", "human_action")
    assert (car.metadata["category"], car.metadata["dimension"]) == ("color+object_class", ["color", "object_class"])


def test_the_ready_made_sets_have_their_categories_and_are_fixed():
    geneval = load_prompts("set:geneval")
    counts = Counter(p.metadata["category"] for p in geneval)
    assert counts == {"single_object": 80, **dict.fromkeys(
        ("two_object", "counting", "colors", "position", "color_attr"), 100
    )}  # fmt: skip
    assert len({p.text for p in geneval}) == len(geneval)
    for prompt in geneval:
        things = prompt.metadata["include"]
        if prompt.metadata["category"] == "counting":
            assert prompt.metadata["exclude"][0] == {"class": things[0]["class"], "count": things[0]["count"] + 1}
            assert {2: "two", 3: "three", 4: "four"}[things[0]["count"]] in prompt.text
        if prompt.metadata["category"] == "position":
            relation, of = things[1]["position"]
            assert prompt.text.split(f" {relation} ")[1].endswith(things[of]["class"])
        for thing in things:
            assert thing.get("color", "") in prompt.text
    assert Counter(p.metadata["category"] for p in load_prompts("set:hps")) == dict.fromkeys(
        ("anime", "concept-art", "paintings", "photo"), 100
    )
    videos = load_prompts("set:videoalign")
    assert len({p.text for p in videos}) == len(videos) == 200
    assert [p.text for p in load_prompts("set:videoalign")] == [p.text for p in videos]
    with pytest.raises(ConfigError, match="did you mean 'set:geneval'"):
        load_prompts("set:genval")


def test_the_shapes_prompts_of_some_categories_alone():
    prompts = load_prompts("shapes:heldout:position,counting")
    assert Counter(p.metadata["category"] for p in prompts) == {"position": 160, "counting": 160}
    with pytest.raises(ConfigError, match="unknown category 'positon'; did you mean 'position'"):
        load_prompts("shapes:train:positon")


@pytest.mark.parametrize("name, fewest", [("images", 3000), ("videos", 500)])
def test_the_shipped_sets_are_many_different_prompts_and_held_out_ones_share_no_subject(name, fewest):
    train, held = (load_prompts(f"set:{name}{part}") for part in ("", "-heldout"))
    assert len({p.text for p in train}) == len(train) >= fewest
    assert len({p.text for p in held}) == len(held) >= 90
    assert train == load_prompts(f"set:{name}")
    assert {p.metadata["category"] for p in train} == {p.metadata["category"] for p in held}
    assert not re.search(r"\ba [aeiou](?!ni)", "\n".join(p.text for p in (*train, *held)))
    subjects = [who for table in (grammar.IMAGES if name == "images" else grammar.VIDEOS).values() for who in table[0]]
    seen = {who for who in subjects for p in train if who in p.text}
    assert not [p.text for p in held for who in seen if who in p.text]
    assert len(seen) > 0.7 * len(subjects)
