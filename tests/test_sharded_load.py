"""Two ranks that read their shards from safetensors hold what they would have kept of the whole, and never more than
that; and 8-bit AdamW's state goes on with as many ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import metrics
from tiny import tiny_config
from torch.distributed.tensor import DTensor

from fastgrpo.errors import ConfigError, UserError
from fastgrpo.meter import Meter
from fastgrpo.models import load_family
from fastgrpo.models.sharded_load import weight_files
from fastgrpo.parallel import check_world, local, prepare_weights, start_world
from fastgrpo.trainer import Trainer

SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from test_sharded_load import ranks
torch.set_num_threads(1)
ranks(Path(sys.argv[1]), Path(sys.argv[2]))
"""

EIGHT = {"update": {"optimizer": {"lr": 1e-4, "kind": "adamw_8bit"}}, "parallel": {"load": "sharded"}}


def loaded(path: Path, load: str) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's shards, and the most bytes of tensors there were while they were loaded."""
    config = tiny_config(path, rollout={"group_size": 4}, parallel={"load": load}, objective={"kl_weight": 0.1})
    world = start_world(config)
    with Meter() as meter:
        family = load_family(config.model, world.device, load == "sharded")
        frozen = prepare_weights(family, config, world)
    assert frozen is not None
    named = [
        *family.policy.state_dict().items(),
        *((f"frozen {n}", t) for n, t in frozen["transformer"].state_dict().items()),
    ]
    assert all(isinstance(t, DTensor) for _, t in named)
    assert all(p.requires_grad for p in family.policy.parameters())
    others = sum(
        p.numel() * p.element_size()
        for name, part in family.pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name != "transformer"
        for p in part.parameters()
    )
    return {name: local(t).clone() for name, t in named}, meter.peak - others


def ranks(path: Path, folder: Path) -> None:
    whole, whole_peak = loaded(path, "whole")
    shards, peak = loaded(path, "sharded")
    same = whole.keys() == shards.keys() and all(torch.equal(whole[n], shards[n]) for n in whole)
    for iterations, resume in ((1, False), (3, True)):
        run = {"dir": str(folder / "resumed"), "seed": 7, "resume": resume}
        settings = {**EIGHT, "rollout": {"group_size": 4}, "train": {"iterations": iterations}}
        Trainer(tiny_config(path, run=run, **settings)).run()
    Trainer(tiny_config(path, folder / "straight", **settings)).run()
    said = {"same": same, "held": sum(t.numel() * 4 for t in shards.values()), "whole": whole_peak, "sharded": peak}
    (folder / f"rank {dist.get_rank()}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def two(tiny_flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(tiny_flux), str(folder)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def test_shards_are_those_of_the_whole_and_half_the_memory(two):
    for rank in range(2):
        said = json.loads((two / f"rank {rank}.json").read_text())
        assert said["same"]
        # The policy's shards and those of its frozen copy, and a tensor at a time.
        assert said["sharded"] < 1.1 * said["held"]
        assert said["sharded"] < 0.6 * said["whole"]


def test_8_bit_state_goes_on_with_as_many_ranks_alone(two, tiny_flux):
    assert len(metrics(two / "straight")) == 3
    assert metrics(two / "resumed") == metrics(two / "straight")
    run = {"dir": str(two / "resumed"), "seed": 7, "resume": True}
    settings = {**EIGHT, "rollout": {"group_size": 4}, "train": {"iterations": 4}, "parallel": {"fsdp": "on"}}
    with pytest.raises(UserError, match="shard 1 of 1"):
        Trainer(tiny_config(tiny_flux, run=run, **settings))


def test_one_line_each(tiny_flux, tmp_path):
    with pytest.raises(ConfigError, match=r"parallel\.load: sharded is for full fine-tuning, and model\.lora is set"):
        tiny_config(tiny_flux, model={"lora": {"rank": 4}}, parallel={"load": "sharded"})
    with pytest.raises(ConfigError, match=r"parallel\.load: sharded, but one rank in float32 shards nothing"):
        check_world(tiny_config(tiny_flux, parallel={"load": "sharded"}), 1, 1)
    with pytest.raises(ConfigError, match=r"parallel\.load: there is no .*diffusion_pytorch_model\.safetensors"):
        weight_files(str(tmp_path), "transformer")
