"""The whole bill: a checkpoint's size is the one that a run writes; hours, host memory and rewards are counted."""

import warnings

import pytest
from support.runs import finished
from support.tiny import tiny_config

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config import RewardSpec
from fastgrpo.planning import plan as planning
from fastgrpo.planning.bill import reward_bill
from fastgrpo.planning.gpus import GPUS
from fastgrpo.rewards.published import COSTS

GPU = GPUS["h100"]


def reward(name="hps", **settings):
    return RewardSpec(name=name, path="weights/x.safetensors", **settings)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_checkpoint_is_as_large_on_disk_as_planned(tiny_flux, tmp_path, lora):
    config = tiny_config(
        tiny_flux, tmp_path / "run", model={"lora": lora}, train={"iterations": 1}, update={"ema_decay": 0.9},
        checkpoint={"keep": 3},
    )  # fmt: skip
    found = planning.plan(config, GPU, 1).bill
    finished(config)
    files = list(CheckpointStore.of_run(tmp_path / "run").path(1).glob("*.safetensors"))
    written = sum(p.stat().st_size for p in files)
    # Each file begins with its header's length: what a tiny LoRA's tensors hardly outweigh.
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in files)
    # Beside the tensors that are planned the optimizer has a step count for each.
    assert found.checkpoint == pytest.approx(written - headers, rel=0.03)
    assert found.checkpoint < written
    assert found.checkpoints == 4


def test_shards_of_all_ranks_are_one_checkpoint_and_what_is_loaded_whole_is_there_on_each(tiny_flux):
    config = tiny_config(tiny_flux, rollout={"group_size": 4})
    one = planning.plan(config, GPU, 1)
    two = planning.plan(config, GPU, 2)
    assert two.bill.checkpoint == pytest.approx(one.bill.checkpoint, rel=0.02)
    assert two.bill.loading == one.bill.loading > 4 * one.run.parameters
    sharded = planning.plan(planning.overridden(config, {"parallel.load": "sharded"}), GPU, 2)
    assert sharded.bill.loading == two.bill.loading - 4 * two.run.parameters
    replicated = planning.plan(planning.overridden(config, {"parallel.replicate": 2}), GPU, 2)
    assert replicated.bill.checkpoint == pytest.approx(one.bill.checkpoint, rel=0.02)


def test_hours_are_iterations_rewards_and_encoding(tiny_flux):
    config = tiny_config(tiny_flux, train={"iterations": 100}, prompts={"train": "shapes:train"})
    with_reward = planning.overridden(config, {"rewards": [reward().model_dump()]})
    plain, scored = (planning.plan(c, GPU, 1) for c in (config, with_reward))
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    assert plain.bill.rewards == 0
    assert scored.bill.rewards == pytest.approx(samples * COSTS["hps"].flops / (GPU.bfloat16 * 0.45))
    seconds = planning.total_seconds(plain, GPU)
    assert plain.bill.hours * 3600 == pytest.approx(100 * seconds + plain.bill.encoding)
    assert scored.bill.hours * 3600 == pytest.approx(100 * (seconds + scored.bill.rewards) + plain.bill.encoding)
    tokens = 200 * config.model.max_sequence_length
    assert plain.bill.encoding == pytest.approx(2 * plain.run.encoders * tokens / (GPU.bfloat16 * 0.45))
    assert plain.run.encoders > 0


def test_rewards_take_memory_where_they_are(tiny_flux):
    kept = reward_bill([reward(), reward("clip"), reward("remote", label="a"), reward("mine.py:Reward", label="b")])
    assert kept.kept == int(2 * COSTS["hps"].parameters) + int(2 * COSTS["clip"].parameters)
    assert (kept.visiting, kept.unknown) == (0, ("a", "b"))
    visiting = reward_bill([reward(options={"offload": True}), reward("clip", options={"offload": True})])
    assert (visiting.kept, visiting.visiting) == (0, int(2 * COSTS["hps"].parameters))
    # VideoAlign's share a backbone.
    both = reward_bill([reward(f"videoalign_{part}", label=part) for part in ("vq", "mq")])
    assert both.kept == int(2 * COSTS["videoalign_vq"].parameters)
    config = tiny_config(tiny_flux)
    plain = planning.plan(config, GPU, 1)
    more = planning.plan(planning.overridden(config, {"rewards": [reward().model_dump()]}), GPU, 1)
    assert more.need - plain.need == kept.kept - int(2 * COSTS["clip"].parameters)
    text = planning.as_text(more)
    for words in ("rewards ", "the run: 2 iterations of", "disk: ", "host memory while the model loads: 1 ×"):
        assert words in text


def test_a_plan_says_nothing_of_pytorchs(tiny_flux):
    config = tiny_config(tiny_flux, rollout={"group_size": 4})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        planning.plan(config, GPU, 2)
    assert not [w for w in said if "FSDP2" in str(w.message)]
