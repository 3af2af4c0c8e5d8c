"""model.lora.path: training goes on from a LoRA, whoever wrote it."""

import copy
from typing import Any, cast

import pytest
import torch
from support.exports import written_run

from fastgrpo.commands.export import export_run
from fastgrpo.config import Lora
from fastgrpo.errors import ConfigError
from fastgrpo.models import load_family
from fastgrpo.models.trainable import load_lora, make_trainable

CPU = torch.device("cpu")


def begun(config, **lora):
    model = config.model.model_copy(update={"lora": Lora(**lora)})
    family = load_family(model, CPU)
    make_trainable(family)
    load_lora(family)
    return family


def deltas(family):
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, layer in family.policy.named_modules():
        if isinstance(layer, BaseTunerLayer):
            A, B = (getattr(layer, f"lora_{x}")["default"].weight.flatten(1).double() for x in "AB")
            found[name] = cast(Any, layer).scaling["default"] * (B @ A)
    return found


@pytest.mark.parametrize(
    "kind, file",
    [("flux", ""), ("flux", "pytorch_lora_weights.safetensors"), ("sd_v", "comfyui.safetensors"), ("wan_two", "")],
)  # fmt: skip
def test_a_run_begins_at_an_exported_lora(tmp_path, kind, file):
    config, trained = written_run(tmp_path, kind)
    out = export_run(tmp_path / "run", tmp_path / "out", comfyui=bool(file))
    # Another alpha: the update is what is carried over.
    family = begun(config, rank=2, alpha=4.0, path=str(out / file))
    ours, theirs = deltas(family), deltas(trained)
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert delta.abs().max() > 1e-3
        assert torch.allclose(ours[name], delta, rtol=1e-5, atol=1e-7)
    # Nothing else is trained, and nothing is left of the adapter that was read.
    names = {name for name, p in family.policy.named_parameters() if p.requires_grad}
    assert names == {name for name, p in trained.policy.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in family.policy.parameters() if p.requires_grad)
    assert not any("given" in name for name, _ in family.policy.named_parameters())


def test_what_does_not_fit_is_one_line(tmp_path):
    config, _ = written_run(tmp_path, "flux")
    out = str(export_run(tmp_path / "run", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: 4, but .* is of rank 2; set it to 2"):
        begun(config, rank=4, path=out)
    with pytest.raises(ConfigError, match=r"has '.*to_k', which model\.lora\.targets leaves out"):
        begun(config, rank=2, path=out, targets=["to_q"])
    with pytest.raises(ConfigError, match=r"model\.lora\.path: '.*base' cannot be read as a LoRA"):
        begun(config, rank=2, path=str(tmp_path / "base"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"model\.lora\.path: '.*broken.safetensors' cannot be read as a LoRA"):
        begun(config, rank=2, path=str(broken))


def test_the_start_is_not_a_reference(tmp_path):
    """The KL's reference is the model without any LoRA, as Flow-GRPO's is."""
    from fastgrpo.models.trainable import lora_disabled

    config, _ = written_run(tmp_path, "flux")
    out = str(export_run(tmp_path / "run", tmp_path / "out"))
    family = begun(config, rank=2, path=out)
    base = load_family(config.model, CPU)
    x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    from fastgrpo.data.prompts import Prompt

    condition, time = family.encode([Prompt("a red circle")]), torch.tensor([0.5])
    with torch.no_grad(), lora_disabled(family.policy):
        off = copy.deepcopy(family.predict(x, time, condition))
    with torch.no_grad():
        assert torch.equal(off, base.predict(x, time, condition))
        assert not torch.allclose(off, family.predict(x, time, condition))
