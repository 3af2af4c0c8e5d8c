"""What a whole run costs beside its iterations' phases: hours, disk, host memory while loading, rewards, encoding.

A reward's parameters and FLOPs are published figures (fastgrpo/rewards/published.py); a reward of one's own, or one of
a server, is not counted, and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.config import Config, RewardSpec
from fastgrpo.data.prompts import load_prompts
from fastgrpo.distributed.world import sharded
from fastgrpo.errors import UserError
from fastgrpo.planning.dry_run import DryRun
from fastgrpo.planning.gpus import COMPUTE_EFFICIENCY, GIB, Gpu
from fastgrpo.rewards.published import SERVED, Cost, cost


@dataclass(frozen=True)
class RewardBill:
    """Of the rewards on each GPU. kept: bytes that stay there; visiting: bytes that are there while the largest of
    those with `offload` scores; flops: of a sample; unknown: the names of those that are not counted."""

    kept: int
    visiting: int
    flops: float
    unknown: tuple[str, ...]


def reward_bill(specs: Sequence[RewardSpec]) -> RewardBill:
    """The rewards' bytes in bfloat16, and FLOPs; those of a server are among the unknown."""
    kept, visiting, flops, unknown = 0, 0, 0.0, []
    # One backbone serves VideoAlign's three rewards.
    counted: set[tuple] = set()
    for spec in specs:
        found = cost(spec)
        if found is None or spec.name in SERVED:
            unknown.append(spec.key)
            continue
        key = ("videoalign", spec.path) if spec.name.startswith("videoalign") else (spec.key,)
        if key in counted:
            continue
        counted.add(key)
        size = _bytes(spec, found)
        if spec.options.get("offload"):
            visiting = max(visiting, size)
        else:
            kept += size
        flops += found.flops
    return RewardBill(kept, visiting, flops, tuple(unknown))


def _bytes(spec: RewardSpec, found: Cost) -> int:
    return int(found.parameters * (4 if spec.options.get("dtype") == "float32" else 2))


@dataclass(frozen=True)
class Bill:
    """Of a whole run. rewards: seconds of an iteration; encoding: seconds of the whole run, of texts encoded once;
    hours: of train.iterations without evaluations; checkpoint: bytes of one on disk; checkpoints: how many at most
    while one is written; loading: bytes of host memory of a rank while the model loads."""

    rewards: float
    encoding: float
    hours: float
    checkpoint: int
    checkpoints: int
    loading: int
    unknown: tuple[str, ...]


def bill(config: Config, run: DryRun, gpu: Gpu, world: int, iteration: float) -> Bill:
    """The bill of a run of `world` GPUs whose iterations take `iteration` seconds without rewards."""
    rewards, rate = reward_bill(config.scored), gpu.bfloat16 * COMPUTE_EFFICIENCY
    samples = config.rollout.prompts_per_iteration * config.rollout.candidates
    scoring = rewards.flops * samples / world / rate
    texts = _distinct_prompts(config)
    encoding = 2 * run.encoders * config.model.max_sequence_length * texts / world / rate
    shards = world // config.parallel.replicate if sharded(config, world) else 1
    best = 1 if config.eval.every else 0
    seconds = config.train.iterations * (iteration + scoring) + encoding
    return Bill(
        scoring, encoding, seconds / 3600, run.state * shards, config.checkpoint.keep + best + 1, run.loading,
        rewards.unknown,
    )  # fmt: skip


def _distinct_prompts(config: Config) -> int:
    """How many prompts the run encodes: all that it draws, or all there are where it may draw any."""
    drawn = config.train.iterations * config.rollout.prompts_per_iteration
    try:
        there = len({prompt.text for prompt in load_prompts(config.prompts.train)})
    except UserError:
        return drawn
    whole = config.prompts.select == "spread" and config.model.text_encoders == "drop"
    return there if whole else min(drawn, there)


def as_lines(found: Bill, config: Config, local: int, iteration: float) -> list[str]:
    """The bill for people; `local` GPUs of a node."""
    uncounted = f"; not counted: {', '.join(found.unknown)}" if found.unknown else ""
    whole = config.model.lora is None and config.parallel.load == "whole" and found.loading > GIB
    return [
        f"rewards: {found.rewards:,.1f} s an iteration{uncounted}",
        f"the run: {config.train.iterations:,} iterations of {iteration + found.rewards:,.1f} s, and "
        f"{found.encoding / 60:,.1f} minutes of encoding texts: {found.hours:,.1f} hours, without evaluations",
        f"disk: {found.checkpoint / 1e9:,.1f} GB a checkpoint, {found.checkpoints} at most: "
        f"{found.checkpoint * found.checkpoints / 1e9:,.0f} GB",
        f"host memory while the model loads: {local} × {found.loading / GIB:,.1f} GiB a node"
        + ("; less with parallel.load=sharded" if whole else ""),
    ]
