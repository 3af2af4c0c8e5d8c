"""Two ranks that read their shards from safetensors hold what they would have kept of the whole, and never more than
that; and 8-bit AdamW's state goes on with as many ranks."""

import json

import pytest
from support.processes import run_ranks
from support.runs import metrics
from support.sharded import EIGHT, ranks
from support.tiny import tiny_config

from fastgrpo.distributed.world import check_world
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models.sharded_load import weight_files
from fastgrpo.training.trainer import Trainer


@pytest.fixture(scope="module")
def two(tiny_flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(folder, ranks, tiny_flux, folder)
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
        Trainer.from_config(tiny_config(tiny_flux, run=run, **settings))


def test_one_line_each(tiny_flux, tmp_path):
    with pytest.raises(ConfigError, match=r"parallel\.load: sharded is for full fine-tuning, and model\.lora is set"):
        tiny_config(tiny_flux, model={"lora": {"rank": 4}}, parallel={"load": "sharded"})
    with pytest.raises(ConfigError, match=r"parallel\.load: sharded, but one rank in float32 shards nothing"):
        check_world(tiny_config(tiny_flux, parallel={"load": "sharded"}), 1, 1)
    with pytest.raises(ConfigError, match=r"parallel\.load: there is no .*diffusion_pytorch_model\.safetensors"):
        weight_files(str(tmp_path), "transformer")
