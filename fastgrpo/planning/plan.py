"""`fastgrpo plan`: whether a config fits a GPU, what an iteration costs, and the nearest settings that fit.

Bytes, FLOPs and collectives are counted by the trainer's own code on fake tensors (dry_run.py). Seconds are arithmetic
on them, at the efficiencies of gpus.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, load_config, validate
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.planning.bill import Bill, as_lines, bill, reward_bill
from fastgrpo.planning.dry_run import DryRun, Phase, dry_run
from fastgrpo.planning.gpus import COMPUTE_EFFICIENCY, GIB, GPUS, LINK_EFFICIENCY, RESERVED, SPARE, Gpu, gpu_named
from fastgrpo.planning.links import seconds


@dataclass(frozen=True)
class Plan:
    config: Config
    gpu: Gpu
    world: int
    local: int
    run: DryRun

    @property
    def need(self) -> int:
        """Bytes of a device at most, rewards and reserved ones included."""
        return max(self.peak(phase) for phase in self.run.phases) + RESERVED

    def peak(self, phase: Phase) -> int:
        """Bytes at most in a phase, with the rewards that are there then; those with `offload` come after decoding."""
        rewards = reward_bill(self.config.scored)
        # They load when they first score, after the prompts are encoded where the encoders are dropped.
        early = phase.name == "encode" and self.config.model.text_encoders == "drop"
        kept = 0 if early else rewards.kept
        return phase.peak + kept + (rewards.visiting if phase.name == "decode" else 0)

    @property
    def bill(self) -> Bill:
        return bill(self.config, self.run, self.gpu, self.world, total_seconds(self, self.gpu))

    @property
    def fits(self) -> bool:
        return self.need <= (1 - SPARE) * self.gpu.memory

    @property
    def worst(self) -> Phase:
        return max(self.run.phases, key=self.peak)

    @property
    def collective_bytes(self) -> int:
        """Full tensor bytes of all collectives of this rank, an iteration."""
        return sum(sum(phase.cost.bytes.values()) for phase in self.run.phases)


def plan(config: Config, gpu: Gpu, world: int, local: int | None = None) -> Plan:
    """The plan of `world` GPUs, `local` on each node (at most 8 if it is not said).

    Of model.activation_checkpointing auto, the least recomputation that fits takes its place, or all if none does.
    """
    local = local or min(world, 8)
    found = None
    for setting in LEAST_FIRST if config.model.activation_checkpointing == "auto" else (None,):
        settings = {} if setting is None else {"model.activation_checkpointing": setting}
        chosen = overridden(config, settings)
        found = Plan(chosen, gpu, world, local, dry_run(chosen, world, local, gpu.memory))
        if found.fits:
            break
    assert found is not None
    return found


# What `auto` tries, the least recomputation first.
LEAST_FIRST = ("none", "selective", "all")


def resolved(config: Config, memory: int, ranks: int, local: int) -> Config:
    """A config with model.activation_checkpointing auto replaced by what fits devices of `memory` bytes; called before
    a process group is made, since a plan makes one of its own."""
    if config.model.activation_checkpointing != "auto":
        return config
    return plan(config, Gpu("this device", memory, 1.0, 1.0, 1.0), ranks, local).config


# What may make a plan fit, nearest first: what costs recomputation or traffic before what changes numerics.
def remedies(config: Config, worst: str) -> Iterator[dict[str, Any]]:
    """Settings to try, one after another, each on top of those before; `worst`: the phase with the highest peak."""
    if worst == "encode" and config.model.lora is None and config.parallel.load != "sharded":
        yield {"parallel.load": "sharded"}
    if worst == "decode":
        if config.rollout.decode_batch > 1:
            yield {"rollout.decode_batch": 1}
        if config.model.frames > 1 and not config.model.vae_tiling:
            yield {"model.vae_tiling": True}
    if worst != "decode" and config.model.activation_checkpointing == "none":
        yield {"model.activation_checkpointing": "selective"}
    if worst != "decode" and config.model.activation_checkpointing != "all":
        yield {"model.activation_checkpointing": "all"}
    if config.rollout.gather != "per_block":
        yield {"rollout.gather": "per_block"}
    if config.update.gather != "per_block":
        yield {"update.gather": "per_block"}
    if config.update.grad_sync != "per_micro_batch":
        yield {"update.grad_sync": "per_micro_batch"}
    batch = config.rollout.forward_batch
    while batch > 1:
        batch //= 2
        yield {"rollout.forward_batch": batch}


def nearest_fit(first: Plan, note: Callable[[str], None] = lambda _: None) -> tuple[dict[str, Any], Plan] | None:
    """Settings that make a plan fit, and that plan: remedies of its worst phase, then more GPUs; None: none does."""
    changed: dict[str, Any] = {}
    current = first
    tried: set[str] = set()
    while not current.fits:
        options = [r for r in remedies(current.config, current.worst.name) if repr(r) not in tried]
        world = current.world
        if options:
            step = options[0]
        elif world < 8 * first.world and current.local * 8 >= world:
            world, step = world * 2, {}
        else:
            return None
        tried.add(repr(step))
        note(f"tries {', '.join(f'{k}={v}' for k, v in step.items()) or f'--world {world}'}")
        try:
            candidate = plan(overridden(current.config, step), first.gpu, world, None)
        except ConfigError:
            if not step:
                return None
            continue
        if candidate.need >= current.need and not candidate.fits:
            if not step:
                # Nor would still more GPUs: what does not fit is whole on each.
                return None
            # It does not help: what costs is not kept.
            continue
        changed |= step or {"--world": world}
        current = candidate
    return changed, current


def overridden(config: Config, settings: dict[str, Any]) -> Config:
    """The config with dotted settings replaced."""
    data = config.model_dump(mode="json")
    for key, value in settings.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    return validate(data)


def as_json(found: Plan, fit: tuple[dict[str, Any], Plan] | None = None) -> dict[str, Any]:
    """Everything a plan knows, in bytes, FLOPs and seconds."""
    result = {
        "gpu": found.gpu.name,
        "world": found.world,
        "parameters": found.run.parameters,
        "trainable": found.run.trainable,
        "fits": found.fits,
        "need_bytes": found.need,
        "memory_bytes": found.gpu.memory,
        "reserved_bytes": RESERVED,
        "collective_bytes": found.collective_bytes,
        "host_bytes_per_rank": found.run.host + checkpointed(found),
        "rows": {"rollout": found.run.forwards, "update": found.run.trained},
        "forward_equivalents": forward_equivalents(found),
        "residency": vars(found.run.residency),
        "phases": [_phase(phase, found) for phase in found.run.phases],
        "seconds": {name: total_seconds(found, gpu) for name, gpu in GPUS.items()},
        "bill": vars(found.bill),
        "efficiency": {"compute": COMPUTE_EFFICIENCY, "link": LINK_EFFICIENCY},
    }
    if fit is not None:
        result["nearest"] = {"settings": fit[0], "need_bytes": fit[1].need}
    return result


def checkpointed(found: Plan) -> int:
    """Bytes that a checkpoint written in the background copies to the host, of each rank."""
    return found.run.state if found.config.checkpoint.background else 0


def forward_equivalents(found: Plan) -> float:
    """Transformer forwards of one row, an iteration and GPU: a backward counts two, a recomputed block one more, but
    not with selective checkpointing, whose matrix products and attention are kept."""
    setting = found.config.model.activation_checkpointing
    recomputed = {"none": 0.0, "selective": 0.0, "all": 1.0}.get(
        str(setting), 1 / int(setting) if isinstance(setting, int) else 0.0
    )
    return found.run.forwards + found.run.compared + found.run.trained * (3 + recomputed)


def total_seconds(found: Plan, gpu: Gpu) -> float:
    """Of an iteration without rewards, communication hidden behind computation as far as it is shorter."""
    return sum(max(seconds(phase, found.config, gpu, found.local)) for phase in found.run.phases)


TABLE_HEAD = (
    "| recipe | fits | GiB a GPU | peak in | forward-equivalents | PFLOP | TB of collectives | seconds |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)

# <model>-<recipe>-<n>x<gpu>
HARDWARE = re.compile(r".*-(\d+)x([a-z][a-z0-9]*)")


def recipes_in(folder: Path) -> list[Path]:
    """Configs of a folder whose names say their hardware."""
    return sorted(path for path in folder.glob("*.yaml") if HARDWARE.fullmatch(path.stem))


def recipe_hardware(path: Path) -> tuple[int, Gpu]:
    """GPUs and their kind of a recipe named <model>-<recipe>-<n>x<gpu>.yaml. Raises UserError for another name."""
    match = HARDWARE.fullmatch(path.stem)
    if match is None:
        raise UserError(f"{path}: the name of a recipe ends in its hardware, such as -8xh100.yaml")
    return int(match[1]), gpu_named(match[2])


def table_row(path: Path) -> str:
    """A recipe's plan on its own hardware, as a line of the table under TABLE_HEAD."""
    world, gpu = recipe_hardware(path)
    found = plan(load_config(path), gpu, world)
    flops = sum(phase.cost.flops for phase in found.run.phases)
    cells = (
        path.stem, "yes" if found.fits else "no", f"{found.need / GIB:.1f}", found.worst.name,
        f"{forward_equivalents(found):,.0f}", f"{flops / 1e15:,.1f}", f"{found.collective_bytes / 1e12:.2f}",
        f"{total_seconds(found, gpu):,.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _phase(phase: Phase, found: Plan) -> dict[str, Any]:
    compute, communication = seconds(phase, found.config, found.gpu, found.local)
    return {
        "name": phase.name,
        "peak_bytes": found.peak(phase),
        "at_peak": {name: size for name, size in phase.at_peak.items() if size},
        "flops": phase.cost.flops,
        "collectives": [
            {"kind": key.kind, "group": key.group, "apart": key.apart, "count": count, "bytes": phase.cost.bytes[key]}
            for key, count in phase.cost.count.items()
        ],
        "seconds": {"compute": compute, "communication": communication},
    }


def as_text(found: Plan, fit: tuple[dict[str, Any], Plan] | None = None) -> str:
    """The plan for people."""
    run = found.run
    trained = "all trained" if run.trainable == run.parameters else f"{run.trainable / 1e6:,.1f} M trained"
    size = f"{run.parameters / 1e9:.2f} B parameters, {trained}"
    lines = [
        f"{found.world} × {found.gpu.name}: {size}; one iteration, each GPU:",
        "",
        f"{'phase':<10} {'peak GiB':>9} {'TFLOP':>10} {'collectives':>12} {'GB':>9} {'compute s':>10} {'links s':>8}",
    ]
    for phase in run.phases:
        compute, links = seconds(phase, found.config, found.gpu, found.local)
        count, size = sum(phase.cost.count.values()), sum(phase.cost.bytes.values())
        lines.append(
            f"{phase.name:<10} {found.peak(phase) / GIB:9.2f} {phase.cost.flops / 1e12:10,.1f} {count:12,} "
            f"{size / 1e9:9,.1f} {compute:10.1f} {links:8.1f}"
        )
    lines += ["", f"at the peak, in {found.worst.name}:"]
    for name, size in sorted(found.worst.at_peak.items(), key=lambda item: -item[1]):
        if size >= 0.005 * GIB or found.need < GIB:
            lines.append(f"  {name:<13} {size / GIB:8.2f} GiB")
    if (size := found.peak(found.worst) - found.worst.peak) > 0:
        lines.append(f"  {'rewards':<13} {size / GIB:8.2f} GiB")
    for key, size in sum((phase.cost.bytes for phase in run.phases[1:]), run.phases[0].cost.bytes.copy()).items():
        count = sum(phase.cost.count[key] for phase in run.phases)
        apart = f", {key.apart} apart" if key.apart > 1 else ""
        lines.append(f"{key.kind} over {key.group} ranks{apart}: {count:,} of {size / 1e9:,.1f} GB in all")
    lines.append(
        f"forward-equivalents: {forward_equivalents(found):,.0f} ({run.forwards:,} rows rolled out, {run.trained:,} "
        f"rows trained{f', {run.compared:,} evaluated by other policies' * bool(run.compared)})"
    )
    lines.append(
        f"host memory: {run.host / GIB * found.local:.1f} GiB a node, and "
        f"{checkpointed(found) / GIB * found.local:.1f} more while a checkpoint is written"
    )
    times = ", ".join(f"{name} {total_seconds(found, gpu):,.1f}" for name, gpu in GPUS.items())
    lines.append(
        f"seconds without rewards, at {COMPUTE_EFFICIENCY:.0%} of peak and {LINK_EFFICIENCY:.0%} of links: {times}"
    )
    lines += as_lines(found.bill, found.config, found.local, total_seconds(found, found.gpu))
    room = found.gpu.memory
    verdict = "fits" if found.fits else "does not fit"
    lines.append(
        f"{verdict}: needs {found.need / GIB:.1f} GiB (2 GiB of it reserved) of {room / GIB:.1f}, with {SPARE:.0%} to "
        "spare"
    )
    if not found.fits:
        lines.append("no setting makes it fit" if fit is None else _remedy(fit))
    return "\n".join(lines)


def _remedy(fit: tuple[dict[str, Any], Plan]) -> str:
    settings = " ".join(f"{k} {v}" if k.startswith("--") else f"{k}={_yaml(v)}" for k, v in fit[0].items())
    return f"nearest that fits: {settings} (needs {fit[1].need / GIB:.1f} GiB)"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
