"""A few blocks stand for a deep model: costs, peaks and what is decided by memory are those of the whole depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from support.tiny_video import build, video_config
from torch import nn

from fastgrpo.config import Config
from fastgrpo.models.architectures import build_family
from fastgrpo.planning import dry_run as dry
from fastgrpo.planning.depth import SHORT, Stack, shorten, stacks_of
from fastgrpo.planning.dry_run import DryRun, dry_run


@pytest.fixture(scope="module")
def deep_flux(tmp_path_factory):
    """The configuration of a tiny FLUX of 6 + 7 blocks; no weights."""
    from fastgrpo.shapes import world
    from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline

    return configured(
        build_pipeline(world.vocabulary(), TinyFluxSizes(double_layers=6, single_layers=7), 0),
        tmp_path_factory.mktemp("deep_flux"),
    )


def configured(pipeline: Any, path: Path) -> Path:
    """A directory of a pipeline's configuration alone."""
    pipeline.save_config(path)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            (path / name).mkdir()
            config: Any = part.config
            text = config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(config)
            (path / name / "config.json").write_text(text)
        elif name == "scheduler":
            part.save_config(path / name)
    return path


def same(config: Config, ranks: int, memory: int = 0, apart: int = 8) -> DryRun:
    """Compares the run of few blocks with that of all, and gives it. apart: bytes between their peaks."""
    short, whole = dry_run(config, ranks, memory=memory), dry_run(config, ranks, memory=memory, whole=True)
    for ours, theirs in zip(short.phases, whole.phases, strict=True):
        assert ours.cost == theirs.cost, ours.name
        # Two scalars of every optimizer step are kept for the log, and the second step is multiplied.
        assert ours.peak == pytest.approx(theirs.peak, abs=apart), ours.name
        assert {k: v for k, v in ours.at_peak.items() if v} == pytest.approx(
            {k: v for k, v in theirs.at_peak.items() if v}, abs=apart
        )
    for name in ("forwards", "trained", "parameters", "trainable", "state", "residency"):
        assert getattr(short, name) == getattr(whole, name), name
    return short


SETTINGS: dict[str, dict[str, Any]] = {
    "per block": {
        "rollout": {"gather": "per_block"}, "update": {"gather": "per_block", "grad_sync": "per_micro_batch"},
        "model": {"activation_checkpointing": "all", "dtype": "bfloat16"},
    },
    "kept": {
        "rollout": {"gather": "once"},
        "update": {"gather": "once", "grad_sync": "once", "ema_decay": 0.9, "optimizer_steps": 2},
    },
    "lora": {"model": {"lora": {"rank": 4}, "dtype": "bfloat16"}, "parallel": {"frozen": "replicate"}},
    "kl": {"objective": {"kl_weight": 0.1}, "rollout": {"trained": {"kind": "subset", "fraction": 0.6}}},
}  # fmt: skip


def test_few_blocks_cost_what_all_do_on_one_rank(deep_flux):
    roll = {"prompts_per_iteration": 1, "group_size": 4, "steps": 3, "trained": {"kind": "window", "size": 2}}
    same(tiny_config(deep_flux, rollout=roll), 1)


@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_few_blocks_cost_what_all_do(deep_flux, name, ranks):
    settings = {key: dict(value) for key, value in SETTINGS[name].items()}
    config = tiny_config(
        deep_flux,
        **{
            **settings,
            "rollout": {
                "group_size": 4, "steps": 3, "forward_batch": 1, "decode_batch": 4,
                "trained": {"kind": "window", "size": 2}, **settings.get("rollout", {}),
            },
        },
    )  # fmt: skip
    assert [stack.length for stack in stacks_of(build_family(config.model), config)] == [6, 7]
    assert same(config, ranks).parameters > 10**6


@pytest.mark.full
@pytest.mark.parametrize("kind", ["hunyuan_video", "wan_two"])
def test_few_blocks_of_a_video_model_cost_what_all_do(kind, tmp_path):
    path = configured(build(kind), tmp_path)
    for name in ("transformer", "transformer_2"):
        if (path / name / "config.json").exists():
            settings = json.loads((path / name / "config.json").read_text())
            settings["num_layers"] = 6
            (path / name / "config.json").write_text(json.dumps(settings))
    model = {"activation_checkpointing": "all"}
    config = video_config(path, kind, model=model, update={"grad_sync": "per_micro_batch", "gather": "per_block"})
    assert [s.length for s in stacks_of(build_family(config.model), config)] == [6, 6][: 2 if kind == "wan_two" else 1]
    # Of two transformers the update's peaks are 768 bytes of 2.4 MB apart.
    same(config, 2, apart=1024 if kind == "wan_two" else 8)


@pytest.mark.full
def test_memory_decides_by_the_whole_depth(deep_flux):
    config = tiny_config(deep_flux, rollout={"group_size": 4})
    everything = dry_run(config, 2).phases[2].peak
    found = dry_run(config, 2, memory=everything // 3).residency
    assert not found.update_unsharded
    assert found == dry_run(config, 2, memory=everything // 3, whole=True).residency


class Pair(nn.Module):
    def __init__(self, width: int, after: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Linear(width, width) for _ in range(6)] + [nn.Linear(width, 1) for _ in range(after)]
        )


class Family:
    block_lists = ("blocks",)

    def __init__(self, module: nn.Module) -> None:
        self.modules = {"m": module}


def test_blocks_that_differ_are_left_alone(tiny_flux):
    config = tiny_config(tiny_flux)
    family: Any = Family(Pair(3, 2))
    stacks = stacks_of(family, config)
    assert stacks == [Stack("m", "blocks", 0, 6)]
    shorten(family, stacks, [SHORT])
    assert [block.out_features for block in family.modules["m"].blocks] == [3, 3, 3, 1, 1]
    with torch.no_grad():
        family = Family(Pair(3, 5))
    assert [stack.begin for stack in stacks_of(family, config)] == [0, 6]


@pytest.mark.parametrize(
    "model", [{"activation_checkpointing": 2}, {"trainable": ["transformer_blocks.0"]}], ids=["every", "trainable"]
)
def test_blocks_that_are_told_apart_by_number_are_all_run(deep_flux, model):
    config = tiny_config(deep_flux, model=model)
    assert stacks_of(build_family(config.model), config) == []


def test_a_plan_runs_few_blocks(deep_flux, monkeypatch):
    seen = []
    prepare = dry.prepare_weights

    def watched(family, *rest):
        seen.append([len(family.denoiser.transformer_blocks), len(family.denoiser.single_transformer_blocks)])
        return prepare(family, *rest)

    def decided(*_):
        raise StopIteration

    monkeypatch.setattr(dry, "prepare_weights", watched)
    monkeypatch.setattr(dry, "decide_residency", decided)
    with pytest.raises(StopIteration):
        dry_run(tiny_config(deep_flux), 1)
    assert seen == [[3, 3], [4, 3], [3, 4]]
