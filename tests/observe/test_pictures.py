"""Videos as files: sheets of frames, animations, films; and a run on videos that writes and reports them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_video import build, video_config

from fastgrpo import errors
from fastgrpo.commands.report import write_report
from fastgrpo.commands.train import train
from fastgrpo.errors import UserError
from fastgrpo.observe.media import animate, read_tiles, to_bytes, write_frames, write_mp4, write_samples, write_webp
from fastgrpo.shapes.moving_render import render_batch
from fastgrpo.shapes.moving_world import all_prompts


@pytest.fixture(scope="module")
def videos():
    """[3, 3, 9, 32, 32]"""
    pixels = render_batch(all_prompts()[30:33], np.random.default_rng(0))
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 255


def test_an_animation_is_read_back_bit_for_bit(videos, tmp_path):
    frames = animate(videos, columns=8, margin=4, smallest=32)
    assert frames.shape == (9, 40, 3 * 36 + 4, 3)
    write_webp(frames, tmp_path / "grid.webp", fps=8)
    with Image.open(tmp_path / "grid.webp") as file:
        assert file.n_frames == 9  # pyright: ignore[reportAttributeAccessIssue]
        file.seek(8)
        np.testing.assert_array_equal(np.asarray(file.convert("RGB")), frames[8])
        assert file.info["duration"] == 125
    tiles = read_tiles(tmp_path / "grid.webp", 3, largest=256)
    assert {kind for kind, _ in tiles} == {"webp"}
    (tmp_path / "tile.webp").write_bytes(tiles[1][1])
    with Image.open(tmp_path / "tile.webp") as file:
        file.seek(5)
        np.testing.assert_array_equal(np.asarray(file.convert("RGB")), to_bytes(videos)[1, 5])


def test_a_sheet_has_a_row_of_frames_for_each_video(videos, tmp_path):
    write_frames(videos, tmp_path / "sheet.png", smallest=32)
    with Image.open(tmp_path / "sheet.png") as file:
        sheet = np.asarray(file)
    assert sheet.shape == (3 * 36 + 4, 9 * 36 + 4, 3)
    np.testing.assert_array_equal(sheet[40:72, 76:108], to_bytes(videos)[1, 2])


def test_an_mp4_has_the_frames_at_their_rate(videos, tmp_path):
    av = pytest.importorskip("av")
    write_mp4(to_bytes(videos)[0, :, :31], tmp_path / "film.mp4", fps=7.5)
    with av.open(tmp_path / "film.mp4") as film:
        stream = film.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(7.5)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(stream)])
    assert frames.shape == (9, 32, 32, 3)
    assert np.abs(frames[:, :31].astype(float) - to_bytes(videos)[0, :, :31]).mean() < 12


def test_an_mp4_without_pyav_names_the_extra(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"an MP4 file: needs the package 'av'; .*fastgrpo\[video\]"):
        write_samples(videos[:1], tmp_path, ["a"], 8, mp4=True)


def test_samples_are_pngs_webps_or_mp4s(videos, tmp_path):
    assert [p.name for p in write_samples(videos[:, :, 0], tmp_path, ["a", "b", "c"], 8)] == ["a.png", "b.png", "c.png"]
    assert write_samples(videos[:1], tmp_path, ["a"], 8) == [tmp_path / "a.webp"]
    assert write_samples(videos[:1], tmp_path, ["a"], 8, mp4=True)[0].stat().st_size > 500


def test_a_run_on_videos_shows_them(tmp_path):
    build("skyreels").save_pretrained(tmp_path / "tiny")
    config = video_config(
        tmp_path / "tiny", "skyreels", run={"dir": str(tmp_path / "run")}, train={"iterations": 1},
        rollout={"prompts_per_iteration": 1, "steps": 3, "trained": {"kind": "window", "size": 1, "start": 0}},
        eval={"every": 1, "images": 2, "steps": 2, "mp4": True},
        rewards=[{"name": "moving_motion"}, {"name": "moving_aesthetics"}],
    )  # fmt: skip
    train(config)
    there = {p.name for p in (tmp_path / "run" / "eval").iterdir()}
    assert {f"{i:06d}.{kind}" for i in (0, 1) for kind in ("png", "webp", "mp4", "json")} <= there
    data = json.loads((tmp_path / "run" / "eval" / "000001.json").read_text())
    assert data["video"] == "000001.webp"
    assert {"moving_motion", "moving_aesthetics", "moving_motion.strict"} <= set(data["rewards"])
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("data:image/webp;base64,") == 4
