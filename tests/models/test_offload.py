"""Offloaded components: where they are when; encoders dropped change no bit; a plan counts when each is there."""

from typing import Any

import pytest
import torch
from support.runs import finished, metrics
from support.tiny import tiny_config

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models import load_family
from fastgrpo.models.placement import Memory, OffloadedModule
from fastgrpo.planning.dry_run import dry_run
from fastgrpo.rollout.decode import decode

META = torch.device("meta")


def devices(module):
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


def test_an_offloaded_module():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    module[1].weight = module[0].weight
    before = list(module.parameters())
    offloaded = OffloadedModule(module, META)
    with offloaded.on_device(Memory()):
        assert devices(module) == {"meta"}
        assert module[1].weight is module[0].weight
        with offloaded.on_device(Memory()):
            pass
        assert devices(module) == {"meta"}
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert devices(module) == {"cpu"}
    with pytest.raises(RuntimeError, match="spoiled"), offloaded.on_device(Memory()):
        raise RuntimeError("spoiled")
    assert devices(module) == {"cpu"}


def test_where_components_are_when(tiny_flux, monkeypatch):
    settings = {"height": 32, "width": 32, "max_sequence_length": 10, "text_encoders": "offload", "vae": "offload"}
    family = load_family(Model(family="flux", path=str(tiny_flux), **settings), torch.device("cpu"))
    # On a CPU nothing waits anywhere else; here the device is one that holds no values.
    assert not family.offloaded
    family.device = META
    waiting = {"text_encoder", "text_encoder_2", "vae"}
    parts = family.pipeline.components
    assert {name for name in parts if family.is_offloaded(name)} == waiting | {"tokenizer", "tokenizer_2"}
    family.offloaded = {name: OffloadedModule(parts[name], META) for name in waiting}
    family.device = torch.device("cpu")
    seen = []

    def see(result):
        seen.append({name for name in waiting if devices(parts[name]) == {"meta"}})
        return result

    monkeypatch.setattr(family, "decode", lambda x: see(x))
    monkeypatch.setattr(family, "encode_prompts", lambda p: see({"text": torch.zeros(len(p), 2)}))
    decode(family, torch.zeros(3, 4), 2)
    family.encode([Prompt("a"), Prompt("b")])
    family.encode([Prompt("a")])
    assert seen == [{"vae"}, {"vae"}, waiting]
    assert all(devices(parts[name]) == {"cpu"} for name in waiting)


def test_what_is_trained_waits_on_the_host_while_prompts_are_encoded_ahead(tiny_flux, tmp_path, monkeypatch):
    settings = {"height": 32, "width": 32, "max_sequence_length": 10, "text_encoders": "drop"}
    model = Model(family="flux", path=str(tiny_flux), embedding_cache=str(tmp_path), **settings)
    family = load_family(model, torch.device("cpu"))
    transformer, encode, seen = family.denoiser, family.encode_prompts, []

    class Moved(torch.nn.Module):
        """Says where it is told to go."""

        def to(self, *args: Any, **_: Any) -> Any:
            seen.append(str(args[0]))
            return self

    monkeypatch.setattr(family, "encode_prompts", lambda prompts: (seen.append("encoding"), encode(prompts))[1])
    family.modules["beside"] = Moved()
    family.encode_ahead([Prompt("a red circle")])
    assert seen == ["cpu", "encoding", "cpu"]
    family.device = torch.device("meta")
    with pytest.raises(RuntimeError, match="spoiled"), family.trained_on_host():
        raise RuntimeError("spoiled")
    assert seen[3:] == ["cpu", "meta"]
    assert devices(transformer) == {"meta"}
    # It has no values to be moved.
    family.device = torch.device("cpu")
    with family.trained_on_host():
        assert devices(transformer) == {"meta"}
    assert devices(transformer) == {"meta"}
    # Nothing is missing from the cache any more.
    family.encode_ahead([Prompt("a red circle")])
    assert seen[5:] == ["cpu", "cpu"]


def test_dropped_encoders_change_no_bit(tiny_flux, tmp_path, monkeypatch):
    sections = {"train": {"iterations": 2}, "eval": {"every": 2, "images": 3}}
    finished(tiny_config(tiny_flux, tmp_path / "kept", **sections))
    model = {"text_encoders": "drop", "embedding_cache": str(tmp_path / "cache")}
    config = tiny_config(tiny_flux, tmp_path / "dropped", model=model, **sections)
    from fastgrpo.training.trainer import Trainer

    trainer = Trainer.from_config(config)
    # Two prompts an iteration, and three to evaluate.
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 7
    assert trainer.family.pipeline.text_encoder is trainer.family.pipeline.text_encoder_2 is None
    monkeypatch.setattr("fastgrpo.models.placement.load_pipeline", lambda *_: pytest.fail("encoders loaded again"))
    trainer.run()
    assert metrics(tmp_path / "dropped") == metrics(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"model\.text_encoders: drop needs .* set model\.embedding_cache"):
        tiny_config(tiny_flux, model={"text_encoders": "drop"})


def test_a_plan_counts_offloaded_components(tiny_flux):
    family = load_family(tiny_config(tiny_flux).model, torch.device("cpu"))
    parts = family.pipeline

    def size(*modules):
        tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    policy, vae, encoders = size(parts.transformer), size(parts.vae), size(parts.text_encoder, parts.text_encoder_2)
    # What is on the device beside the policy: while prompts are encoded, in rollout, decode and update.
    for settings, beside in (
        ({}, [vae + encoders] * 3),
        ({"vae": "offload", "text_encoders": "offload"}, [vae + encoders, 0, vae, 0]),
        # What is trained is loaded first, and makes room.
        ({"text_encoders": "drop", "embedding_cache": "none"}, [vae + max(encoders - policy, 0), vae, vae, vae]),
    ):
        planned = dry_run(tiny_config(tiny_flux, model=settings))
        assert [p.name for p in planned.phases] == ["encode"] * (len(beside) - 3) + ["rollout", "decode", "update"]
        assert [p.at_peak["parameters"] - policy for p in planned.phases] == beside, settings
