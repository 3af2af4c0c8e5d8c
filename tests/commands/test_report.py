"""The report: what it shows of a run, that it needs nothing beside itself, and that it lies about nothing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from support import report_runs
from support.report_runs import PROMPTS
from support.tiny import tiny_config

import fastgrpo
from fastgrpo.commands.report import pictures, write_report
from fastgrpo.commands.report.pictures import grid_tiles
from fastgrpo.config import dump
from fastgrpo.config.yaml import parse_yaml
from fastgrpo.errors import UserError
from fastgrpo.observe import charts
from fastgrpo.observe.charts import moving_mean
from fastgrpo.observe.media import write_grid


class Page(HTMLParser):
    """Text, tags that stay open, and everything a page refers to."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open, self.references, self.words, self.scripts = [], [], [], 0
        self.feed(markup)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def make_run(tmp_path):
    """A run directory of a name."""
    return lambda name="first", **options: report_runs.make_run(tmp_path / name, **options)


def test_a_report_shows_the_run_and_needs_nothing_beside_itself(make_run):
    run = make_run()
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    assert not page.open
    assert page.scripts == 0
    assert all(ref.startswith(("data:image/png;base64,", "#")) or ref == "data:," for ref in page.references)
    assert "@import" not in path.read_text()
    assert "50.0% → 70.0%" in page.text
    assert "gain +15.0 … +25.0 points (95%), 96 held-out images" in page.text
    assert "two object 50.0% 70.0% +20.0" in page.text
    assert "update 24 s 60.0%" in page.text
    assert "rollout 12 s 30.0%" in page.text
    assert "Exactly 0 in every iteration: Gaussian KL." in page.text
    assert "clip range" in page.text
    for fact in (
        "trained 2026-11-24 10:20 UTC",
        "took 40 s of iterations",
        "commit abc123, with changes that are not in",
    ):
        assert fact in page.text
    assert "machine 2 × NVIDIA H100, x86_64" in page.text
    assert "versions fastgrpo 0.1.0, torch 2.13.0" in page.text
    assert "group_size: 3" in page.text
    for prompt in PROMPTS:
        assert prompt in page.text
    for title in (
        "Reward in training",
        "shapes.strict on held-out prompts",
        "Gradient norm",
        "Clipped pairs",
        "Time by phase",
    ):
        assert title in page.text


@pytest.mark.parametrize(
    "action, falling, words",
    [
        ("off", 0, "The guard (guard.action) is off; held did not fall while the trained reward rose."),
        ("off", 1, "rose in 10 iterations, first in 30; nothing was done about it."),
        ("stop", 1, "The guard (guard.action) is stop; of held, one fell"),
    ],
)
def test_a_report_always_says_what_watched_rewards_did(make_run, action, falling, words):
    run = make_run()
    assert "no watched reward was scored" in Page(write_report(run).read_text()).text
    rewards = [{"name": "shapes"}, {"name": "ocr", "label": "held", "weight": 0.0}]
    (run / "config.yaml").write_text(dump(tiny_config(run, rewards=rewards, guard={"action": action})))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line | {"reward/held": 0.5, "guard/falling": falling * (line["iteration"] >= 30)} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    page = Page(write_report(run).read_text())
    assert words in page.text
    assert "first: watched reward held" in page.text


def test_a_report_tells_memory_stragglers_and_what_held_clocks_back(make_run):
    run = make_run()
    assert "came last" not in Page(write_report(run).read_text()).text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"memory/update_bytes": (2.0 + i / 40) * 2**30, "ranks/last": float(i % 4 == 0), "gpu/limited": 0.25}
        line |= {"ranks/behind_seconds": 0.3, "gpu/power_w": 5000.0, "gpu/clock_mhz": 1700.0 - i}
        line |= {"gpu/joules_per_sample": 52.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write_report(run).read_text()).text
    assert "update 24 s 60.0% 2.98 GiB" in text
    assert "rank 0 came last in 30 of 40 iterations, and the last one was 0.3 s behind the median rank" in text
    assert "5000 W, 52 J a sample; slowest clock 1661 MHz, 25% of readings held back by power or heat" in text


def test_a_report_is_the_same_bytes_for_the_same_run(make_run):
    run = make_run()
    assert write_report(run).read_bytes() == write_report([run]).read_bytes()


def test_a_report_during_training_uses_the_runs_own_evaluations(make_run):
    page = Page(write_report(make_run(gain=0.1, summary=False)).read_text())
    assert "50.0% → 60.0%" in page.text
    # Of three values: 0, 1, 1 before, and 1, 1, 0 after.
    assert "did not change measurably: from 50.0% to 60.0% ( +10.0 points, 95% interval -100.0 … +100.0 )" in page.text
    bare = Page(write_report(make_run("bare", gain=0.1, summary=False, values=False)).read_text())
    assert "from 50.0% to 60.0% ( +10.0 points ); shapes rose" in bare.text
    assert "No interval: the evaluations did not keep the score of each sample." in bare.text


def test_the_opening_says_what_was_trained_what_rose_and_what_fell(make_run):
    run = make_run()
    text = Page(write_report(run).read_text()).text
    assert "Training changed all weights of" in text
    assert "for the reward shapes , in 40 iterations" in text
    assert (
        "On 96 images of held-out prompts (never trained on), the share that is exactly right ( shapes.strict ) rose "
        "from 50.0% to 70.0% ( +20.0 points, 95% interval +15.0 … +25.0 )" in text
    )
    assert "No reward that was measured fell." in text
    summary = json.loads((run / "summary.json").read_text())
    summary["difference"]["shapes"] = {"mean": -0.1, "interval95": [-0.15, -0.05]}
    summary["tuned"]["rewards"]["shapes"] = 0.5
    spread = {"base": 0.5, "tuned": 0.4}
    change = {"overall": {"mean": -0.1, "interval95": [-0.12, -0.08]}}
    summary["diversity"] = {"overall": spread, "within_prompt": None, "difference": change}
    (run / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report(run).read_text()).text
    assert "shapes fell from 0.600 to 0.500 ( -0.100, 95% interval -0.150 … -0.050 )" in text
    assert "in a CLIP) fell from 0.500 to 0.400 (-0.100, 95% interval -0.120 … -0.080)." in text
    assert "No reward that was measured fell." not in text


def test_pictures_are_marked_counted_and_most_changed_first(make_run):
    text = Page(write_report(make_run()).read_text()).text
    places = [text.index(prompt) for prompt in PROMPTS]
    assert places[0] < places[2] < places[1]
    assert "1 became right, 1 became wrong, 1 stayed." in text
    assert "before ✗ wrong after ✓ right" in text[places[0] : places[2]]
    assert "before ✓ right after ✗ wrong" in text[places[2] : places[1]]


def test_the_closing_evaluations_pictures_and_numbers_are_shown_together(make_run):
    run = make_run()
    (run / "final").mkdir()
    (run / "eval").rename(run / "final" / "eval")
    (run / "eval").mkdir()
    for path in (run / "final" / "eval").glob("*.json"):
        record = json.loads(path.read_text())
        (run / "eval" / path.name).write_text(json.dumps(record | {"prompts": ["of the run"], "images": 48}))
    text = Page(write_report(run).read_text()).text
    assert "of the run" not in text
    assert PROMPTS[0] in text
    assert "Dots: the evaluations during training, of 48 images. Diamonds: the closing evaluation, of 96" in text


def test_a_page_stays_small_whatever_its_pictures_and_its_length(make_run, monkeypatch):
    run = make_run(summary=False)
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 3, 256, 256, generator=rng)
    for iteration in (0, 40):
        write_grid(noise, run / "eval" / f"{iteration:06d}.png")
        path = run / "eval" / f"{iteration:06d}.json"
        record = json.loads(path.read_text()) | {"prompts": [f"prompt {i}" for i in range(6)], "values": {}}
        path.write_text(json.dumps(record))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(3000):
            file.write(json.dumps(lines[i % 40] | {"iteration": i}) + "\n")
    path = write_report(run)
    assert path.stat().st_size < 1_000_000
    assert "prompt 5" in path.read_text()
    monkeypatch.setattr(pictures, "BUDGET", 20_000)
    text = Page(write_report(run).read_text()).text
    assert re.search(r"\d+ images that changed least are left out", text)


def test_colours_of_a_chart_are_those_of_the_page(make_run):
    markup = write_report(make_run()).read_text()
    for svg in re.findall("<svg.*?</svg>", markup, re.DOTALL):
        assert not set(re.findall(r"#[0-9a-f]{6}", svg)) & set(charts.VARIABLES)
        assert re.match(r'<svg role="img" aria-label="[^"]+, by iteration\. [^"]+"', svg)
    ids = re.findall(r' id="([^"]+)"', markup)
    assert all(f"#{name}" in markup for name in ids)


def test_runs_side_by_side_share_charts_and_say_where_they_differ(make_run, tmp_path):
    path = write_report([make_run(), make_run("second", gain=0.1, lr=2e-5)], tmp_path / "both.html")
    page = Page(path.read_text())
    assert "50.0% → 70.0%" in page.text
    assert "50.0% → 60.0%" in page.text
    assert "update.optimizer.lr 1e-05 2e-05" in page.text
    assert (
        page.text.count("before")
        >= len(PROMPTS)
        <= page.text.count("second ✓ right") + page.text.count("second ✗ wrong")
    )
    assert page.text.count("Reward in training") == 1
    assert len([ref for ref in page.references if ref.startswith("data:image")]) == 3 * len(PROMPTS)


def test_a_run_without_evaluations_is_reported(make_run):
    run = make_run(summary=False)
    for file in (run / "eval").iterdir():
        file.unlink()
    page = Page(write_report(run).read_text())
    assert "Reward in training" in page.text
    assert "Images" not in page.text


def test_tiles_are_the_pictures_of_the_contact_sheet(tmp_path):
    pictures = torch.rand(11, 3, 48, 96, generator=torch.Generator().manual_seed(0))
    write_grid(pictures, tmp_path / "grid.png", smallest=96)
    expected = (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    tiles = grid_tiles(tmp_path / "grid.png", 11)
    assert len(tiles) == 11
    for tile, picture in zip(tiles, expected, strict=True):
        data = base64.b64decode(re.sub("^data:image/png;base64,", "", tile))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)


def test_large_tiles_are_shrunk(tmp_path):
    write_grid(torch.rand(2, 3, 400, 600), tmp_path / "grid.png")
    data = base64.b64decode(grid_tiles(tmp_path / "grid.png", 2)[0].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (256, 171)


def test_moving_mean_is_of_the_values_behind():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert moving_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert moving_mean(values, 1).tolist() == values.tolist()


def test_what_is_no_finished_run_is_refused(make_run, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    run = make_run()
    with pytest.raises(UserError, match="is a directory; name the HTML file"):
        write_report(run, ".")
    first = min((run / "eval").glob("*.json"))
    kept = first.read_text()
    first.write_text("null")
    with pytest.raises(UserError, match=f"{first.name}: not a JSON object; remove it"):
        write_report(run)
    first.write_text(kept)
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: not valid JSON"):
        write_report(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has not finished an iteration"):
        write_report(run)


def damage(file, content):
    """A file of a run that holds something else."""
    return lambda run: sorted(run.glob(file))[0].write_bytes(content)


@pytest.mark.parametrize(
    "broken, said",
    [
        (damage("config.yaml", b""), r"config\.yaml: not the config of a run"),
        (damage("config.yaml", b"\xff\xfe\x00"), r"config\.yaml: not a text file"),
        (damage("eval/*.json", b"[]"), r"000000\.json: not a JSON object"),
        (damage("eval/*.json", b"{}"), r"000000\.json: not an evaluation"),
        (damage("eval/*.png", b"?"), r"000000\.png: not a picture"),
    ],
    ids=["no config", "no text", "no object", "no evaluation", "no picture"],
)
def test_a_file_of_a_run_that_is_something_else_is_one_line(make_run, broken, said):
    run = make_run()
    for path in (run / "summary.json", *run.glob("final/eval/*")):
        path.unlink(missing_ok=True)
    (run / "events.jsonl").write_text('[1]\n5\n{"time": 1}\n')
    write_report(run)
    broken(run)
    with pytest.raises(UserError, match=said):
        write_report(run)


def test_a_reward_that_scored_no_held_out_sample_is_said_to_be_silent(make_run):
    run = make_run()
    (run / "summary.json").unlink()
    for path in (run / "eval").glob("*.json"):
        data = json.loads(path.read_text())
        data["rewards"]["held"] = math.nan
        data["values"]["held"] = [None] * len(data["values"]["shapes"])
        path.write_text(json.dumps(data))
    rewards = {"rewards": [{"name": "shapes"}, {"name": "tests:Held", "label": "held", "weight": 0}]}
    config = parse_yaml((run / "config.yaml").read_text(), "config") | rewards
    (run / "config.yaml").write_text(json.dumps(config))
    text = Page(write_report(run).read_text()).text
    assert "held gave no score." in text
    assert not re.search(r"\bnan\b", text)


def test_a_run_writes_its_report_after_each_evaluation_and_says_what_was_gained(tiny_flux, tmp_path):
    config = tiny_config(
        tiny_flux, tmp_path / "run", eval={"every": 1, "images": 4, "grid": 2},
        callbacks=["fastgrpo.commands.report.while_training:ReportCallback"],
    )  # fmt: skip
    fastgrpo.train(config)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    said = {event["iteration"]: event["text"] for event in events if "report:" in event.get("text", "")}
    # Nothing before there is training behind an evaluation.
    assert list(said) == [1, 2]
    before, after = (json.loads((tmp_path / "run" / "eval" / f"{i:06d}.json").read_text()) for i in (0, 2))
    gain = 100 * (after["strict_pass"] - before["strict_pass"])
    assert f"{gain:+.1f} points (95% interval " in said[2]
    assert said[1].endswith("report.html; training goes on")
    assert said[2].endswith("report.html")
    assert "of 2 iterations" not in (tmp_path / "run" / "report.html").read_text()
