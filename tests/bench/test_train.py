"""The suite of whole iterations: rows, refusals, real configurations with random weights, the page."""

import json

import pytest
import torch
from support.tiny import tiny_config
from typer.testing import CliRunner

from fastgrpo.commands.bench import app, load
from fastgrpo.config.sections import dump_settings
from fastgrpo.errors import UserError
from fastgrpo.models import load_family
from fastgrpo.models.architectures import build_family
from fastgrpo.planning.dry_run import dry_run

train, cases, page, real = (load(name) for name in ("train", "train_cases", "train_page", "real_size"))
CPU = torch.device("cpu")
SMALL = {"rollout.steps": 4, "rollout.prompts_per_iteration": 1, "rollout.group_size": 2}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has what this refuses")


def counted_flops(config, directory, *loader):
    """FLOPs of an iteration whose prompts are encoded already."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(directory)})})
    bench = train.Bench(config, *loader)
    trainer = bench.trainer
    trainer.family.encode([trainer.rollouts.prompts[i] for i in trainer.rollouts.sampler.at(0)])
    with train.ModelFlops() as counted:
        bench.iterate()
    return counted.flops


def test_flops_are_those_of_the_plan_and_recomputed_blocks_are_not_counted(tiny_flux, tmp_path):
    plain = tiny_config(tiny_flux, rollout={"share_prefix": False}, objective={"kl_weight": 0.1})
    planned = sum(phase.cost.flops for phase in dry_run(plain).phases)
    assert counted_flops(plain, tmp_path / "plain") == planned > 0
    recomputed = plain.model_copy(update={"model": plain.model.model_copy(update={"activation_checkpointing": "all"})})
    assert sum(phase.cost.flops for phase in dry_run(recomputed).phases) > planned
    assert counted_flops(recomputed, tmp_path / "recomputed") == planned


def test_a_row_of_a_model_beside_its_baseline():
    row = train.measure("flux", "tiny", {"name": "base", "settings": SMALL}, 1, True)
    assert set(row) == set(train.COLUMNS)
    phases = {phase: row[f"{phase}_s"] for phase in train.PHASES}
    assert all(seconds > 0 for name, seconds in phases.items() if name not in ("sync", "other"))
    assert sum(phases.values()) == pytest.approx(row["iteration_s"], rel=0.01)
    assert row["samples_per_s"] == pytest.approx(2 / row["iteration_s"], rel=1e-3)
    assert row["mfu"] == pytest.approx(row["tflop"] / row["iteration_s"] / row["peak_tflops"], rel=0.02)
    assert row["speedup"] == pytest.approx(row["sequential_s"] / row["iteration_s"], rel=0.01)
    assert row["peak_mib"] > 100
    if not torch.cuda.is_available():
        assert row["peak_by"] == "matmul"
        assert row["joules_per_sample"] == ""
    assert row["shape"] == "32x32, 1x2 samples, 4 steps, 2 trained, batch 16, float32 full"


@pytest.mark.full
@pytest.mark.parametrize("model", list(cases.MODELS))
def test_every_model_is_measured(model):
    """And every sample trained: else an iteration's cost would follow its rewards, and `measure` refuses."""
    settings = SMALL | {"rollout.group_size": 4}
    row = train.measure(model, "tiny", {"name": "base", "settings": settings}, 1, False)
    assert row["samples_per_s"] > 0


def test_iterations_that_do_not_train_every_sample_are_refused():
    line = dict.fromkeys(("time/total", *(f"time/{phase}" for phase in train.PHASES)), 1.0)
    line |= {"samples/trained": 8.0, "memory/peak_bytes": 1e6}
    assert train._row([line], 8, 10**12, 1e12)["mfu"] == 1.0
    with pytest.raises(UserError, match="not every sample was trained"):
        train._row([line, line | {"samples/trained": 7.0}], 8, 10**12, 1e12)


def test_the_points_of_sweeps():
    names = {size: [p.name for p in cases.points("wan", size, list(cases.SWEEPS))] for size in cases.SIZES}
    for found in names.values():
        assert found[0] == "base"
        assert {name.partition("=")[0] for name in found[1:]} == set(cases.SWEEPS)
    assert not [p for p in cases.points("flux", "tiny", ["frames"]) if p.name != "base"]
    resolution = cases.points("flux", "tiny", ["resolution"])[1]
    assert resolution.settings == {"model.height": 48, "model.width": 48}
    assert [p.settings for p in cases.points("flux", "tiny", ["compile"])] == [{}, {"model.compile": "blocks"}]


@pytest.mark.parametrize("model", list(cases.MODELS))
def test_every_point_is_a_valid_config(model, tmp_path):
    for size in cases.SIZES:
        for number, point in enumerate(cases.points(model, size, list(cases.SWEEPS))):
            config = cases.case_config(model, size, point.settings, tmp_path / f"{size}{number}")
            assert config.model.family == cases.family_name(model)
            window = config.rollout.trained
            assert window.move == "fixed"
            assert not config.eval.every


def test_what_cannot_be_measured_is_one_line():
    with pytest.raises(UserError, match=r"^bench train: unknown model 'fluks'; did you mean 'flux'"):
        train.run(["fluks"], "tiny", None, [], 1, False, False)
    with pytest.raises(UserError, match=r"^bench train: unknown sweep 'step'; did you mean 'steps'"):
        train.run(["flux"], "tiny", ["step"], [], 1, False, False)
    with pytest.raises(UserError, match=r"^bench train: .*no-such-ref"):
        train.compare("no-such-ref", ["flux"], "tiny", None, [], 1)


@needs_no_gpu
def test_real_sizes_need_a_gpu():
    with pytest.raises(UserError, match=r"^bench train: --size real needs a CUDA GPU"):
        train.run(["flux"], "real", None, [], 1, False, False)


def test_a_point_that_fails_is_named_at_the_end(monkeypatch, capsys):
    def child(tree, model, size, point, *rest):
        raise UserError("out of memory")

    monkeypatch.setattr(train, "in_process", child)
    with pytest.raises(UserError, match=r"^bench train: not measured: flux base, wan base; see above"):
        train.run(["flux", "wan"], "tiny", None, [], 1, False, True)
    assert "flux base: out of memory" in capsys.readouterr().err


def test_random_weights_of_a_configuration_train(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", rewards=[cases.REWARD])
    pipeline = load_family(config.model, CPU).pipeline
    tokenizers = {name: getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2")}
    bench = train.Bench(config, lambda model, device, sharded: build_family(model, device, tokenizers))
    weights, shipped = list(bench.trainer.family.policy.parameters()), list(pipeline.transformer.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights, shipped, strict=True) if a.ndim > 1)
    before = [p.clone() for p in weights]
    bench.iterate()
    (line,) = bench.metrics(0)
    assert line["optimizer_steps/skipped"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))


# Of every stack of blocks, how many are left.
SHORT = {"num_layers": 1, "num_single_layers": 1, "num_hidden_layers": 3, "layers": 1}


@pytest.mark.full
@needs_no_gpu
@pytest.mark.parametrize("model", ["flux", "qwen_image"])
def test_a_real_configuration_trains_with_its_stacks_cut_short(model, tmp_path, monkeypatch):
    """Its widths, encoders, tokenizers and VAE as they are, on a small image. The other families' take longer than
    this suite may on two cores; tests/models run them as fake tensors."""
    from fastgrpo.models import architectures

    whole = architectures.architecture

    def short(path):
        spec = whole(path)
        for _, _, settings in spec["parts"].values():
            for part in (settings, settings.get("text_config", {})):
                part.update({name: count for name, count in SHORT.items() if name in part})
        if model == "qwen_image":
            spec["parts"]["transformer"][2].update(num_layers=1)
            spec["parts"]["text_encoder"][2]["vision_config"]["depth"] = 1
        return spec

    monkeypatch.setattr(architectures, "architecture", short)
    small = {"model.height": 64, "model.width": 64, "model.max_sequence_length": 32, "model.dtype": "float32"}
    small |= {"model.lora": {"rank": 4, "alpha": 8.0}}
    config = cases.case_config(model, "real", small | SMALL | {"rollout.trained.size": 2}, tmp_path)
    assert counted_flops(config, tmp_path / "run", real.random_family) > 1e9


def test_the_page_shows_the_committed_tables():
    assert page.document() == page.DOCUMENT.read_text(encoding="utf-8")
    for table in page.DATA.glob("train-*.csv"):
        assert table.with_suffix(".png").exists()
        for row in page.read(table):
            assert set(row) == set(train.COLUMNS)


def made_up(model, point, date, rate):
    numbers = dict.fromkeys(train.COLUMNS, 0.5) | {"samples_per_s": rate, "speedup": "", "joules_per_sample": ""}
    return numbers | {
        "model": model,
        "size": "tiny",
        "point": point,
        "date": date,
        "commit": date,
        "peak_by": "matmul",
        "clock": "wall",
    }


def test_rows_become_a_page_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DATA", tmp_path)
    monkeypatch.setattr(page, "DOCUMENT", tmp_path / "benchmarks.md")
    page.DOCUMENT.write_text("before\n" + "".join(page.MARKS) + "after\n")
    rows = [made_up("flux", "base", "2026-01-02", 4.0), made_up("flux", "base", "2026-01-01", 9.0)]
    rows += [made_up("flux", "steps=16", "2026-01-01", 2.0), made_up("wan", "base", "2026-01-01", 1.0)]
    table = tmp_path / "train-cpu.csv"
    train.tables.upsert(table, rows, train.KEY, train.COLUMNS)
    page.write(table)
    assert table.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = page.DOCUMENT.read_text()
    assert "| flux | tiny | 4 |" in text
    assert "| 9 |" not in text
    assert "| flux | tiny | steps=16 | 2 | 0.50 |" in text
    assert text.index("| wan |") > text.index("| flux |")
    assert text.startswith("before")
    assert text.endswith("after\n")


def test_the_command_measures_in_a_process_of_its_own_and_prints_json():
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    run = CliRunner().invoke(app, ["train", "--model", "flux", "--iterations", "1", "--no-write", "--json", *settings])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout)
    assert row["point"] == "base " + " ".join(settings)
    assert row["samples_per_s"] > 0


@pytest.mark.full
def test_this_tree_beside_a_git_ref():
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    (row,) = train.compare("HEAD", ["flux"], "tiny", None, settings, 1)
    assert row["ratio"] == pytest.approx(row["here_s"] / row["base_s"], rel=0.01)


def test_a_config_is_still_compared_with_its_baseline(tiny_flux, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux)))
    run = CliRunner().invoke(app, ["train", str(path), "--json", "--iterations", "1"])
    assert run.exit_code == 0, run.output
    assert {"speedup", "ours", "sequential"} <= set(json.loads(run.stdout))
