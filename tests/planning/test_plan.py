"""Plans: the multiplication changes no figure, measurement agrees, what does not fit is told what would."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import tiny_images
from support.tiny import tiny_config
from support.tiny_images import image_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from fastgrpo.commands.main import app
from fastgrpo.config import Model, load_config
from fastgrpo.config.sections import dump_settings
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models.architectures import architecture, build_family, known
from fastgrpo.planning import plan as planning
from fastgrpo.planning.dry_run import dry_run
from fastgrpo.planning.gpus import GPUS, Gpu, gpu_named
from fastgrpo.planning.meter import Collective, Meter


@pytest.mark.full
def test_multiplying_changes_no_figure(tiny_flux):
    config = tiny_config(
        tiny_flux, rollout={"group_size": 6, "steps": 4, "forward_batch": 1, "decode_batch": 1},
        update={"optimizer_steps": 3, "grad_sync": "per_micro_batch"},
    )  # fmt: skip
    short, whole = dry_run(config, 2), dry_run(config, 2, whole=True)
    assert (short.forwards, short.trained) == (whole.forwards, whole.trained)
    for ours, theirs in zip(short.phases, whole.phases, strict=True):
        assert ours.cost == theirs.cost, ours.name
        # Two scalars of every optimizer step are kept for the log, and two steps are multiplied.
        assert ours.peak == pytest.approx(theirs.peak, abs=16), ours.name
    assert short.phases[2].cost.flops > 0


def test_what_a_meter_counts():
    weight = torch.ones(100, 50)
    meter = Meter()
    meter.claim([weight], "parameters")
    with meter:
        first = torch.ones(10, 100) @ weight
        with meter.counting("caches"):
            kept = first.view(5, 100)[:2] + 1
        del first
    assert meter.cost.flops == 2 * 10 * 100 * 50
    assert dict(meter.live) == {"parameters": 20000, "activations": 0, "caches": 800}
    assert meter.peak == 20000 + 10 * 100 * 4 + 10 * 50 * 4
    assert meter.at_peak == {"parameters": 20000, "activations": 6000}
    del kept
    assert meter.total == 20000


def test_the_meter_is_the_profiler_for_sharded_weights():
    group = {"rank": 0, "world_size": 2, "store": FakeStore()}
    dist.init_process_group("fake", **group)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in range(4)))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
        meter = Meter()
        meter.claim(model.parameters(), "parameters")
        held = meter.total
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, meter:
            for _ in range(2):
                model(torch.ones(20, 500)).sum().backward()
    finally:
        dist.destroy_process_group()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    more = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert meter.peak - held == pytest.approx(more.max(), rel=0.02)


def test_attention_is_counted():
    q = torch.ones(2, 3, 10, 8, requires_grad=True)
    with Meter() as meter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert meter.cost.flops == 2 * 2 * 3 * 10 * 10 * 16 * 7 // 2


def test_a_plan_says_what_would_fit(tiny_flux, monkeypatch, tmp_path):
    config = tiny_config(tiny_flux, rollout={"forward_batch": 16, "group_size": 16, "decode_batch": 1})
    monkeypatch.setattr(planning, "RESERVED", 0)
    need = planning.plan(config, GPUS["h100"], 1).need
    monkeypatch.setitem(GPUS, "h100", Gpu("h100", int(need / 0.95), 989e12, 67e12, 450e9))
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(config))
    run = CliRunner().invoke(app, ["plan", str(path), "--world", "1"])
    assert run.exit_code == 1, run.output
    assert "does not fit" in run.stdout
    assert "nearest that fits: model.activation_checkpointing=selective" in run.stdout
    found = planning.plan(config, GPUS["h100"], 1)
    data = json.loads(json.dumps(planning.as_json(found, ({"model.activation_checkpointing": "all"}, found))))
    assert not data["fits"]
    assert data["need_bytes"] == found.need > 0.9 * data["memory_bytes"]
    assert [phase["name"] for phase in data["phases"]] == ["rollout", "decode", "update"]


def test_a_family_whose_scheduler_reads_its_tensors_is_planned():
    small = ["rollout.prompts_per_iteration=1", "rollout.group_size=2", "rollout.steps=3", "rollout.forward_batch=2"]
    window = [f"rollout.trained.{setting}" for setting in ("size=1", "start=0", "stop=null", "move=fixed")]
    config = load_config("configs/shapes-stable-diffusion.yaml", [*small, *window])
    assert [phase.name for phase in dry_run(config).phases] == ["rollout", "decode", "update"]


def test_masks_that_ranks_exchange_are_counted(tmp_path):
    tiny_images.build("qwen_image").save_pretrained(tmp_path)
    small = {"steps": 2, "group_size": 2, "trained": {"kind": "window", "size": 1, "start": 0}}
    config = image_config(tmp_path, "qwen_image", rollout=small, parallel={"context": 2, "shard": 1})
    count, blocks = dry_run(config, 2).phases[0].cost.count, 2
    # Queries, keys, values and the output of every block's attention.
    calls = count[Collective("all_to_all", 2)] // 4
    # Its mask, every output of the model, and the weights of each block and of the rest, once.
    assert count[Collective("all_gather", 2)] == calls + calls // blocks + blocks + 1


def test_one_line_each(tiny_flux):
    with pytest.raises(UserError, match="--gpu: unknown GPU 'h1000'; did you mean 'h100'"):
        gpu_named("h1000")
    with pytest.raises(ConfigError, match=r"model\.path: a plan needs the configuration of 'some/model'"):
        architecture("some/model")
    with pytest.raises(ConfigError, match="do not divide over 4 ranks"):
        dry_run(tiny_config(tiny_flux), 4)


# Published sizes, in billions.
SIZES = {
    "black-forest-labs/FLUX.1-dev": ("flux", 11.9), "black-forest-labs/FLUX.1-Kontext-dev": ("flux_kontext", 11.9),
    "hunyuanvideo-community/HunyuanVideo": ("hunyuan_video", 12.8),
    "skyreels-v1-i2v": ("skyreels", 12.8), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", 1.42),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan", 14.3), "CompVis/stable-diffusion-v1-4": ("stable_diffusion", 0.86),
    "Qwen/Qwen-Image": ("qwen_image", 20.4), "stabilityai/stable-diffusion-3.5-large": ("sd3", 8.06),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 2.24),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("wan", 28.6),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("hunyuan_video_1_5", 8.33),
    "Lightricks/LTX-2": ("ltx2", 18.9),
    "Qwen/Qwen-Image-Edit-2509": ("qwen_image_edit", 20.4), "Qwen/Qwen-Image-2.1": ("qwen_image_2_1", 7.1),
    "Tongyi-MAI/Z-Image-Turbo": ("z_image", 6.15), "black-forest-labs/FLUX.2-klein-base-4B": ("flux2", 3.88),
    "black-forest-labs/FLUX.2-klein-base-9B": ("flux2", 9.08),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("path", SIZES)
def test_the_configurations_have_the_published_sizes(path):
    family, size = SIZES[path]
    assert path.replace("/", "--").replace("--", "/") in known()
    built = build_family(Model(family=family, path=path, max_sequence_length=256))
    assert sum(p.numel() for p in built.policy.parameters()) / 1e9 == pytest.approx(size, rel=0.02)


def test_seconds_are_arithmetic(tiny_flux):
    found = planning.plan(tiny_config(tiny_flux), GPUS["h100"], 2)
    update = found.run.phases[2]
    compute, links = planning.seconds(update, found.config, found.gpu, 2)
    assert compute == pytest.approx(update.cost.flops / (67e12 * 0.45))
    sizes = update.cost.bytes
    gathered, reduced = sizes[Collective("all_gather", 2)], sizes[Collective("reduce_scatter", 2)]
    norms = sizes[Collective("all_reduce", 2)]
    assert links == pytest.approx((gathered / 2 + reduced / 2 + norms) / 450e9 / 0.7)


def test_a_recipe_says_its_hardware(tiny_flux, tmp_path):
    (tmp_path / "tiny-fast-2xh100.yaml").write_text(dump_settings(tiny_config(tiny_flux)))
    (tmp_path / "tiny.yaml").write_text("")
    assert planning.recipe_hardware(Path("configs/wan-2.1-1.3b-fast-8xh100.yaml")) == (8, GPUS["h100"])
    with pytest.raises(UserError, match="the name of a recipe ends in its hardware"):
        planning.recipe_hardware(tmp_path / "tiny.yaml")
    run = CliRunner().invoke(app, ["plan-table", str(tmp_path)])
    assert run.exit_code == 0, run.output
    row = run.stdout.splitlines()[-1].split(" | ")
    assert row[:2] == ["| tiny-fast-2xh100", "yes"]
    assert len(row) == planning.TABLE_HEAD[0].count("|") - 1


@pytest.mark.full
@pytest.mark.parametrize("recipe", [path.stem for path in planning.recipes_in(Path("configs"))])
def test_every_recipe_fits_and_the_document_has_its_plan(recipe):
    row = planning.table_row(Path("configs") / f"{recipe}.yaml")
    assert row.startswith(f"| {recipe} | yes |")
    assert row in Path("docs/scale.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.full
@pytest.mark.parametrize("recipe", sorted(path.stem for path in Path("configs").glob("*-1x24gb.yaml")))
def test_every_recipe_for_a_card_of_24_gb_fits_it_and_the_document_has_its_plan(recipe):
    found = planning.plan(load_config(f"configs/{recipe}.yaml"), GPUS["rtx4090"], 1)
    assert found.fits
    rate = planning.total_seconds(found, GPUS["rtx4090"])
    row = f"| {recipe} | {found.need / 2**30:.1f} | {found.worst.name} | {rate:.0f} |"
    assert row in Path("docs/scale.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("whole, worlds", [(True, [2]), (False, [2, 4, 8])])
def test_more_gpus_are_tried_while_they_help_and_no_longer(tiny_flux, monkeypatch, whole, worlds):
    """whole: what does not fit is on every GPU; else it is sharded, and eight do."""
    config = tiny_config(tiny_flux, rollout={"forward_batch": 1, "decode_batch": 1})
    monkeypatch.setattr(planning, "remedies", lambda config, worst: iter(()))

    def planned(config, gpu, world, local) -> Any:
        need = 800 if whole else 800 // world
        return SimpleNamespace(
            config=config,
            gpu=gpu,
            world=world,
            local=1,
            need=need,
            fits=need <= 100,
            worst=SimpleNamespace(name="encode"),
        )

    monkeypatch.setattr(planning, "plan", planned)
    tried = []
    found = planning.nearest_fit(planned(config, GPUS["h100"], 1, 1), tried.append)
    assert tried == [f"tries --world {world}" for world in worlds]
    assert (found is None) == whole
    if found is not None:
        assert found[0] == {"--world": 8}


def test_what_is_whole_while_prompts_are_encoded_may_be_loaded_in_shards(tiny_flux):
    config = tiny_config(tiny_flux)
    assert next(iter(planning.remedies(config, "encode"))) == {"parallel.load": "sharded"}
    lora = planning.overridden(config, {"model.lora": {"rank": 2}})
    assert {"parallel.load": "sharded"} not in list(planning.remedies(lora, "encode"))
