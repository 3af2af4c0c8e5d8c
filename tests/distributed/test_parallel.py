"""Ranks: one rank is two ranks, sharded or replicated, however weights are gathered and gradients reduced; a mesh that
cannot be is one line before anything loads. Two processes on gloo."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_ranks
from support.runs import metrics
from support.tiny import tiny_config
from support.two_ranks import PLANNED, finished, measured, runs_of

from fastgrpo.distributed.fsdp import hold_weights, unsharded
from fastgrpo.distributed.residency import residency
from fastgrpo.distributed.world import TASKS, World, check_world, launched
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.planning.dry_run import dry_run

UPDATE = {"optimizer_steps": 2, "ema_decay": 0.9}
ALONE = {"update": UPDATE}
AUTO = {"update": {**UPDATE, "optimizer": {"lr": "auto"}}}
VARIANTS = {
    "once": {"update": {**UPDATE, "grad_sync": "once", "gather": "once"}, "rollout": {"gather": "once"}},
    "per block": {
        "update": {**UPDATE, "grad_sync": "per_micro_batch", "gather": "per_block"},
        "rollout": {"gather": "per_block"},
    },
    "replicated": {"update": UPDATE, "parallel": {"replicate": 2}},
    "context": {
        "update": UPDATE,
        "parallel": {"context": 2},
        "rollout": {"trajectory": "host"},
        "scoring": {"chunks": 3},
    },
}


FROZEN = {
    "frozen sharded": {"model": {"lora": {"rank": 4}}, "update": UPDATE},
    "frozen replicated": {"model": {"lora": {"rank": 4}}, "update": UPDATE, "parallel": {"frozen": "replicate"}},
}

# Objectives of the forward process: an old policy that decays is evaluated from the first optimizer step on.
DECAY = {"rate": 0.1, "most": 0.5}
FORWARD = {
    "nft": {
        "objective": {"kind": "nft", "old_decay": DECAY, "times": {"count": 2}}, "rollout": {"shared_noise": False},
        "update": {**UPDATE, "epochs": 2},
    },
    "awm lora": {
        "objective": {"kind": "awm", "clip_low": 1.0, "clip_high": 1.0, "old_decay": DECAY}, "update": UPDATE,
        "model": {"lora": {"rank": 4}}, "parallel": {"frozen": "replicate"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_flux, tmp_path_factory):
    """Every variant on two ranks, and the run of one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, runs_of, tiny_flux, folder, VARIANTS | FROZEN | FORWARD | {"auto": AUTO})
    # In a process of its own: the tensors that earlier tests hold would count.
    run_ranks(folder, measured, tiny_flux, folder / "measured 1", PLANNED, ranks=1)
    finished(tiny_flux, folder / "alone", ALONE)
    finished(tiny_flux, folder / "alone auto", AUTO)
    finished(tiny_flux, folder / "alone lora", FROZEN["frozen sharded"])
    for name, settings in FORWARD.items():
        finished(tiny_flux, folder / f"alone {name}", settings)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_rank(tiny_flux, runs, variant):
    compare(tiny_flux, runs / "alone", runs / variant)


def test_two_ranks_find_the_rate_of_one(tiny_flux, runs):
    compare(tiny_flux, runs / "alone auto", runs / "auto")
    one, two = ([line["lr"] for line in metrics(runs / name)] for name in ("alone auto", "auto"))
    assert one[1] == 2 * one[0]
    assert two == pytest.approx(one, rel=1e-6)


def test_several_ranks_tell_who_came_last(runs):
    def reported(folder):
        lines = [json.loads(line) for line in (runs / folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k.startswith("ranks/")} for line in lines]

    assert reported("alone") == [{}, {}]
    for line in reported("once"):
        assert line["ranks/last"] in (0, 1)
        assert line["ranks/behind_seconds"] >= 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_is_what_is_measured(tiny_flux, runs, ranks):
    found = json.loads((runs / f"measured {ranks}" / "cost.json").read_text())
    planned = dry_run(tiny_config(tiny_flux, **PLANNED), ranks)
    cost = planned.phases[0].cost
    for phase in planned.phases[1:]:
        cost.add(phase.cost)
    collectives = {f"{key.kind} {key.group}": [count, cost.bytes[key]] for key, count in cost.count.items()}
    assert found.pop("flops") == pytest.approx(cost.flops, rel=0.01)
    assert found.pop("peak") == pytest.approx(max(phase.peak for phase in planned.phases), rel=0.05)
    assert found == collectives


@pytest.mark.parametrize("variant", FROZEN)
def test_a_frozen_base_may_be_sharded_or_whole(tiny_flux, runs, variant):
    compare(tiny_flux, runs / "alone lora", runs / variant)


@pytest.mark.parametrize("variant", FORWARD)
def test_a_forward_process_on_two_ranks_is_that_of_one(tiny_flux, runs, variant):
    compare(tiny_flux, runs / f"alone {variant}", runs / variant, still=1)


def compare(path: Path, alone: Path, together: Path, still: int = 2) -> None:
    """still: of how many iterations the policy is that of the rollout when they begin to train."""
    one, two = load_file(alone / "weights.safetensors"), load_file(together / "weights.safetensors")
    start = load_file(next(Path(path).glob("transformer/*.safetensors")))
    # LoRA's B starts at zero; its A is drawn, and hardly moves.
    trained = [n for n in one if n in start or "lora_B" in n]
    moved = torch.stack([(one[n] - start.get(n, torch.zeros(()))).norm() for n in trained]).norm()
    apart = torch.stack([(one[n] - two[n]).norm() for n in one]).norm()
    # Adam divides by √v: where a gradient is nearly 0, its rounding decides the sign of a step.
    assert apart / moved < 1e-2
    for number, (a, b) in enumerate(zip(metrics(alone), metrics(together), strict=True)):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        deviation = [row["ratio/first_max_deviation"] for row in (a, b)]
        assert deviation == pytest.approx(deviation[::-1], rel=1e-3)
        assert (max(deviation) == 0) is (number < still)
    for iteration in range(3):
        rewards = [
            json.loads((d / "eval" / f"00000{iteration}.json").read_text())["rewards"] for d in (alone, together)
        ]
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


@pytest.mark.parametrize(
    "parallel, ranks, local, said",
    [
        (
            {"replicate": 3},
            4,
            4,
            "replicate 3 × shard auto × context 1 needs a multiple of 3 ranks, and there are 4",
        ),
        ({"replicate": 2, "shard": 4}, 4, 4, "replicate 2 × shard 4 × context 1 needs 8 ranks, and there are 4"),
        ({"context": 3}, 6, 2, "parallel.context: groups of 3 ranks do not fit nodes of 2; make it a divisor of 2"),
        ({}, 4, 4, "6 samples an iteration do not divide over 4 ranks × 1 optimizer steps"),
        ({"fsdp": "off"}, 2, 2, "parallel.fsdp: off, but there are several ranks"),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_be_is_one_line(tiny_flux, parallel, ranks, local, said):
    with pytest.raises(ConfigError, match=said):
        check_world(tiny_config(tiny_flux, parallel=parallel), ranks, local)


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"RANK": "1"}, "RANK: 1, and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR: not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a number"),
        ({"SLURM_PROCID": "3"}, "WORLD_SIZE: not set, and SLURM_PROCID is 3: every task would train alone"),
        ({"OMPI_COMM_WORLD_RANK": "1", "WORLD_SIZE": ""}, "OMPI_COMM_WORLD_RANK is 1"),
    ],
    ids=str,
)
def test_variables_that_make_no_rank_are_one_line_at_each(monkeypatch, environment, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *TASKS):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1, 0, 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # No ConfigError, which rank 0 alone says.
    with pytest.raises(UserError, match=said) as caught:
        launched()
    assert not isinstance(caught.value, ConfigError)


def test_a_task_that_says_so_trains_alone(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("SLURM_PROCID", "3")):
        monkeypatch.setenv(name, value)
    assert launched() == (0, 1, 0, 1)


def test_what_makes_a_mesh(tiny_flux):
    for parallel, ranks in (
        ({"replicate": 3}, 6),
        ({"shard": 2}, 2),
        ({"replicate": 2, "shard": 3}, 6),
        ({"context": 2}, 4),
        ({"replicate": 2, "context": 2}, 12),
    ):
        check_world(tiny_config(tiny_flux, parallel=parallel), ranks, ranks)


def test_what_is_not_sharded_is_not_walked_for_each_micro_batch(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    monkeypatch.setattr(model, "modules", lambda: pytest.fail("walked"))
    hold_weights(model, last=True)
    with unsharded([model], on=True):
        pass


def test_auto_keeps_what_memory_allows(tiny_flux):
    config = tiny_config(tiny_flux)
    policy = torch.nn.Linear(1000, 1000, bias=False)
    # 4 MB of weights, 8 of moments, 4 of gradients; nothing is sharded, so nothing is gathered.
    for megabytes, kept in ((0, (True, True, True)), (100, (True, True, True)), (30, (True, True, False)),
                            (20, (True, False, False)), (14, (False, False, False))):  # fmt: skip
        found = residency(config, policy, World(0, 1, torch.device("cpu"), memory=megabytes * 10**6))
        assert (found.rollout_unsharded, found.update_unsharded, found.sync_once) == kept, megabytes
    fixed = tiny_config(tiny_flux, rollout={"gather": "once"}, update={"gather": "per_block", "grad_sync": "once"})
    found = residency(fixed, policy, World(0, 1, torch.device("cpu"), memory=1))
    assert (found.rollout_unsharded, found.update_unsharded, found.sync_once) == (True, False, True)
