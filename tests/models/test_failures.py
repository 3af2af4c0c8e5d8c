"""An error out of a component of the pipeline is one line; any other keeps its traceback."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.data.prompts import Prompt
from fastgrpo.models import load_family
from fastgrpo.models.failures import component_failure

CPU = torch.device("cpu")


def edited(source: Path, folder: Path, component: str, **settings: object) -> Path:
    shutil.copytree(source, folder)
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def failure(work, *arguments):
    try:
        work(*arguments)
    except Exception as error:
        return component_failure(error)
    pytest.fail("it did not fail")


def test_a_run_of_a_component_that_cannot_run_is_one_line(tiny_flux, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = edited(tiny_flux, tmp_path / "model", "text_encoder_2", dropout_rate=float("nan"))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tiny_config(folder).model_dump(mode="json")))
    assert main(["train", str(file), f"run.dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = r"error: T5EncoderModel of transformers fails where it runs; its config\.json may not fit: "
    found = re.fullmatch(said + r"RuntimeError: dropout .* nan; traceback: (.*)", line)
    assert found
    assert "modeling_t5.py" in Path(found[1]).read_text()


def test_what_is_not_a_components_is_none_of_its(tiny_flux, monkeypatch):
    family = load_family(tiny_config(tiny_flux).model, CPU)
    x, time = torch.zeros(1, *family.latent_shape), torch.full((1,), 0.5)
    conditioning = family.encode([Prompt("a red circle")])
    line = failure(family.predict, x[..., :-1], time, conditioning)
    assert line is not None
    assert line.startswith("FluxTransformer2DModel of diffusers fails where it runs; ")
    assert failure(lambda: 1 / 0) is None

    def lacks(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(family.denoiser.x_embedder, "forward", lacks)
    assert failure(family.predict, x, time, conditioning) is None

    def between(*_, **__):
        torch._dynamo.graph_break()
        torch._dynamo.optimize(1, 2, 3, 4, 5)

    monkeypatch.setattr(family.denoiser.x_embedder, "forward", between)
    assert failure(family.predict, x, time, conditioning) is None
