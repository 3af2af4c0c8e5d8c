"""A LoRA on an NF4 base: what a layer computes, that a run starts at ratio 1, trains, exports and is planned."""

import importlib.util

import pytest
import torch
from support.runs import metrics
from support.tiny import tiny_config

from fastgrpo.commands.export import export_run
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models.nf4 import NF4Linear, dequantize, quantized_layers
from fastgrpo.planning.dry_run import dry_run
from fastgrpo.training.trainer import Trainer

NF4 = {"lora": {"rank": 4}, "quantize": "nf4"}


@pytest.mark.parametrize("shape", [(64, 128), (63, 130), (5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradient(shape, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0]).to(dtype)
    packed = NF4Linear(layer, torch.device("cpu"))
    weight = dequantize(packed.weight, packed.scale, shape, dtype).double()
    # The rounding error of NF4 on evenly spread values, as RMS ratio; 0.1 on normal ones.
    assert 0 < (weight - layer.weight).norm() / layer.weight.double().norm() < 0.12
    x = torch.randn(7, shape[1], dtype=dtype, requires_grad=True)
    y = packed(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    with torch.no_grad():
        assert torch.equal(packed(x), y)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert x.grad is not None
    for ours, exact in ((y, x.double() @ weight.T + layer.bias.double()), (x.grad, grad.double() @ weight)):
        assert (ours - exact).norm() < tolerance * exact.norm()
    bits = 8 * sum(b.numel() * b.element_size() for b in packed.buffers())
    assert bits / (shape[0] * shape[1]) == pytest.approx(4.5, rel=0.1)


@pytest.fixture(scope="module")
def run(tiny_flux, tmp_path_factory):
    path = tmp_path_factory.mktemp("nf4") / "run"
    update = {"optimizer": {"lr": 1e-2}}
    trainer = Trainer.from_config(tiny_config(tiny_flux, path, model=NF4, objective={"kl_weight": 0.1}, update=update))
    base = [b.clone() for layer in quantized_layers(trainer.family.policy) for b in layer.buffers()]
    trainer.run()
    return trainer, base


def test_it_trains_its_lora_from_ratio_one(run):
    trainer, base = run
    logged = metrics(trainer.log.directory)
    assert [line["ratio/first_max_deviation"] for line in logged] == [0, 0]
    assert all(line["grad_norm"] > 0 for line in logged)
    after = [b for layer in quantized_layers(trainer.family.policy) for b in layer.buffers()]
    assert len(after) > 20
    assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))
    trained = dict(zip(trainer.optimizer.names, trainer.optimizer.parameters, strict=True))
    assert all("lora_" in name for name in trained)
    assert any(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)


def test_it_exports_a_lora_and_merges_into_the_whole_base(run, tiny_flux, tmp_path):
    from diffusers import FluxPipeline

    trainer, _ = run
    export_run(trainer.log.directory, tmp_path / "lora")
    export_run(trainer.log.directory, tmp_path / "merged", merge=True)
    pipe = FluxPipeline.from_pretrained(tiny_flux)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = FluxPipeline.from_pretrained(tmp_path / "merged")
    for (name, ours), theirs in zip(
        merged.transformer.state_dict().items(), pipe.transformer.state_dict().values(), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_one_line_each(tiny_flux, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.quantize: nf4 weights cannot be trained; set model\.lora"):
        tiny_config(tiny_flux, model={"quantize": "nf4"})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match=r"model\.quantize: nf4: needs the package 'bitsandbytes'; .*fastgrpo\[gpu\]"):
        Trainer.from_config(tiny_config(tiny_flux, tmp_path, model=NF4))


def test_a_plan_counts_what_a_run_holds(run, tiny_flux):
    trainer, _ = run
    config = tiny_config(tiny_flux, model={**NF4, "dtype": "bfloat16"})
    whole = tiny_config(tiny_flux, model={"lora": {"rank": 4}, "dtype": "bfloat16"})
    planned, unquantized = dry_run(config), dry_run(whole)
    assert (planned.parameters, planned.trainable) == (unquantized.parameters, unquantized.trainable)
    assert planned.phases[2].cost.flops == unquantized.phases[2].cost.flops
    layers = quantized_layers(trainer.family.policy)
    saved = sum(2 * x.weight.numel() * 2 - sum(b.numel() * b.element_size() for b in x.buffers()) for x in layers)
    held = [p.phases[2].at_peak["parameters"] for p in (planned, unquantized)]
    # FSDP2 pads what it shards, not what it leaves alone.
    assert held[1] - held[0] == pytest.approx(saved, rel=0.01)
