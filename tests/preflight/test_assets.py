"""`fastgrpo assets`: here, absent, partial and gated, in one list, offline and from a hub of our own; every recipe."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import serve_hub
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.config import dump, load_config
from fastgrpo.preflight.assets import find_assets, snapshot, wanted_files
from fastgrpo.rewards import REGISTERED
from fastgrpo.rewards.published import COSTS, FREE, cost
from fastgrpo.shapes import weights_path

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TRAINED = [path for path in RECIPES if not path.stem.startswith("pretrain-")]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder without anything, no network and an empty cache of the hub; gives the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("FASTGRPO_REWARD_TOKEN", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def said(capsys):
    """Runs a command: (exit code, lines on stderr, lines on stdout)."""

    def run(*words):
        code = main(list(map(str, words)))
        out = capsys.readouterr()
        return code, out.err.splitlines(), out.out.splitlines()

    return run


@pytest.mark.parametrize("path", TRAINED, ids=lambda p: p.stem)
def test_a_recipe_says_offline_in_one_list_what_is_missing(nowhere, said, path):
    code, errors, out = said("assets", path)
    missing = [line.removeprefix("missing: ") for line in errors]
    assert len(missing) == len(set(missing)) == sum(line.split()[0] in ("absent", "partial") for line in out)
    assert code == (2 if missing else 0)
    if path.stem.startswith("shapes-"):
        assert not missing
    else:
        assert missing
        # What GenEval is to count in each edit only a file of one's own says.
        own = path.stem == "flux-kontext-parity-8xh100"
        assert own == any(line.startswith("prompts") for line in missing), "the others' prompts are shipped"
        assert all("; " in line for line in missing), "each says how it is got"
    checked, lines, _ = said("train", path, "--check")
    for line in missing:
        source = line.split(": ", 1)[1].split(" is ")[0]
        assert any(line in shown or (shown.startswith("error: ") and source in shown) for shown in lines), line
    others = [line for line in lines if not line.startswith(("warning: ", "missing: "))]
    assert checked == (2 if others else 0)
    # What ends a run before it could ask the hub: a reward's converted weights, a server's token.
    assert all("rewards" in line or "cannot read the prompts" in line for line in others), others


def test_gated_weights_and_pickled_ones_are_told_with_their_steps(nowhere, said):
    _, lines, out = said("assets", ROOT / "configs" / "flux-fast-8xh100.yaml")
    model, hps = lines[0], lines[1]
    assert "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, then hf auth login" in model
    assert "33.7 GB" in model
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir weights && fastgrpo convert-reward" in hps
    assert out[-1].endswith("to download")
    Path("token").write_text("hf_x")
    assert "hf auth login" not in said("assets", ROOT / "configs" / "flux-fast-8xh100.yaml")[1][0]


@pytest.fixture
def tiny(nowhere, tmp_path):
    """A config whose model and reward are repositories of a hub; the directories that stand for them."""
    config = tiny_config("lab/tiny-flux", tmp_path / "run", rewards=[{"name": "clip", "path": "lab/tiny-clip"}])
    (tmp_path / "c.yaml").write_text(dump(config))
    return {"lab/tiny-flux": weights_path("flux"), "lab/tiny-clip": weights_path("flux").parent / "clip"}


def test_what_is_missing_is_downloaded_and_then_here(nowhere, tiny, said, monkeypatch):
    code, errors, _ = said("assets", "c.yaml")
    assert code == 2
    assert [line.split(" is ")[0] for line in errors] == [
        "missing: model.path: lab/tiny-flux", "missing: rewards.clip: lab/tiny-clip"
    ]  # fmt: skip
    with serve_hub(tiny) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        code, errors, out = said("assets", "c.yaml", "--download")
    assert code == 0, errors
    assert [line.split()[0] for line in out[:-1]] == ["here"] * 4
    folder = snapshot("lab/tiny-flux")
    assert folder is not None
    names = {str(p.relative_to(weights_path("flux"))) for p in weights_path("flux").rglob("*") if p.is_file()}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {n for n in names if "/" in n} | {
        "model_index.json"
    }
    # One file less, or half of one: partial, and named.
    weights = next(folder.glob("transformer/*.safetensors"))
    data = weights.read_bytes()
    weights.unlink()
    (line,) = said("assets", "c.yaml")[1]
    assert "lab/tiny-flux is partial; there are no weights in" in line
    weights.write_bytes(data[: len(data) // 2])
    (line,) = said("assets", "c.yaml")[1]
    assert "it is cut short" in line


def test_one_that_the_hub_refuses_does_not_stop_the_others(tiny, said, monkeypatch):
    with serve_hub(tiny, gated=["lab/tiny-flux"]) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        code, errors, _ = said("assets", "c.yaml", "--download")
    assert code == 2
    (line,) = [line for line in errors if line.startswith("missing: ")]
    steps = "accept its licence at https://huggingface.co/lab/tiny-flux, then hf auth login"
    assert line == f"missing: model.path: lab/tiny-flux: is gated: {steps}"
    assert snapshot("lab/tiny-clip") is not None
    with serve_hub({}) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        _, errors, _ = said("assets", "c.yaml", "--download")
    assert any("the hub has no such repository" in line for line in errors)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, errors, _ = said("assets", "c.yaml", "--download")
    assert code == 2
    assert any("the hub did not give it" in line for line in errors)


def test_a_whole_file_is_asked_of_a_disk_that_holds_it(tiny, said, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with serve_hub(tiny) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        _, errors, _ = said("assets", "c.yaml", "--download")
    assert sum(line.endswith(" free") for line in errors) == 2


def test_only_the_files_that_are_read_are_downloaded():
    files = [
        "model_index.json", "flux1-dev.safetensors", "README.md", "unet/config.json", "unet/a.bin",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "a/b/c.json",
    ]  # fmt: skip
    kinds = (".json", ".safetensors")
    plain = set(wanted_files(files, kinds, None, True))
    assert plain == {"model_index.json", "unet/config.json", files[5], files[7]}
    assert set(wanted_files(files, kinds, "fp16", True)) == plain - {files[5]} | {files[6]}
    assert set(wanted_files(files, kinds, None, False)) == {"model_index.json", "flux1-dev.safetensors"}


def test_rewards_within_rewards_and_files_of_ones_own_are_listed(nowhere, tmp_path):
    (tmp_path / "mine.py").write_text("def score(samples, prompts, fps): ...")
    rewards = [
        {"name": "binary", "options": {"of": {"name": "pickscore"}, "threshold": 1.0}},
        {"name": "binary", "label": "broken", "options": {"of": {"nome": 3}}},
        {"name": "mine.py:score"},
        {"name": "gone.py:score"},
        {"name": "remote", "options": {"url": "http://a:1"}},
    ]
    found = {a.source: a for a in find_assets(tiny_config(weights_path("flux"), rewards=rewards))}
    assert found["yuvalkirstain/PickScore_v1"].setting == "rewards.binary.pickscore"
    assert (found["mine.py"].state, found["gone.py"].state, found["http://a:1"].state) == (
        "here",
        "absent",
        "elsewhere",
    )


def test_costs_are_those_of_the_architectures():
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPConfig, CLIPModel

    layers = {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **layers}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"), torch.no_grad():
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
        with FlopCounterMode(display=False) as counted:
            model.get_image_features(pixel_values=torch.empty(1, 3, 224, 224))
    assert COSTS["clip"].parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)
    assert COSTS["clip"].flops == pytest.approx(counted.get_total_flops(), rel=0.03)
    assert {*COSTS, *FREE} == set(REGISTERED), "a reward's cost is known, or none of this GPU's"
    specs = load_config(ROOT / "configs" / "flux-fast-8xh100.yaml").scored
    assert [cost(spec) for spec in specs] == [COSTS["hps"], COSTS["pickscore"], COSTS["clip"]]
    assert cost(specs[0].model_copy(update={"name": "mine.py:Reward"})) is None


@pytest.mark.parametrize("source", ["words:train:word", "editing:heldout", "set:images"])
def test_prompts_of_this_package_are_here_whatever_their_world(nowhere, tmp_path, source):
    config = tiny_config(tmp_path / "model", prompts={"train": source})
    found = {asset.setting: asset for asset in find_assets(config)}["prompts.train"]
    assert (found.state, found.where) == ("here", "among what is installed")
