"""One iteration of a config by the trainer's own code on fake tensors and a fake process group: what each phase costs.

Two evaluations of the model of each kind are run, and what follows is stood for by the second one's cost; a test proves
that this changes no figure. Nothing is allocated, whatever the model's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from fastgrpo.adamw_8bit import AdamW8bit
from fastgrpo.architectures import build_family, encoded_shapes
from fastgrpo.config import Config
from fastgrpo.meter import Cost, Meter
from fastgrpo.models import Conditioning, ModelFamily
from fastgrpo.models.nf4 import parameter_count, quantized_layers
from fastgrpo.models.offload import Visitor
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import (
    Residency,
    World,
    check_world,
    gathered,
    make_world,
    prepare_weights,
    residency,
    sharded,
)
from fastgrpo.rollout import Layout, decode, lay_out, rank_samples, rollout
from fastgrpo.schedule import RolloutPlan, plan_rollout
from fastgrpo.update import MicroBatch, Updater

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """peak: bytes of live tensors at most; at_peak: the same by category. rows: model evaluations with and without
    gradients, in rows of one branch."""

    name: str
    cost: Cost
    peak: int
    at_peak: dict[str, int]


@dataclass(frozen=True)
class DryRun:
    """phases: of one iteration of rank 0. forwards, trained: rows that it evaluates without and with gradients.
    parameters, trainable: of the whole model. state: bytes that a checkpoint copies to the host, of this rank."""

    phases: list[Phase]
    forwards: int
    trained: int
    parameters: int
    trainable: int
    state: int
    residency: Residency


def dry_run(config: Config, ranks: int = 1, local: int | None = None, memory: int = 0, whole: bool = False) -> DryRun:
    """An iteration of rank 0 of `ranks`, `local` on a node, on devices of `memory` bytes (0: not known).

    whole: every model evaluation is run, none is multiplied. Raises ConfigError, as the trainer would.
    """
    check_world(config, ranks, local or ranks)
    with _process_group(config, ranks):
        world = replace(make_world(config, ranks, 0, CPU), memory=memory)
        family = build_family(config.model)
        family.device = CPU
        meter, mode = Meter(), FakeTensorMode(allow_non_fake_inputs=True)

        policy = family.policy
        whole_weights = (*policy.parameters(), *policy.buffers()) if config.parallel.load == "whole" else ()
        loaded = sum(t.numel() * t.element_size() for t in whole_weights)

        def fill(module: nn.Module) -> None:
            with mode:
                materialize(module)

        frozen = prepare_weights(family, config, world, fill)
        with mode, meter:
            return _Iteration(config, world, family, meter, whole, loaded).run(frozen)


@contextmanager
def _process_group(config: Config, ranks: int) -> Iterator[None]:
    if not sharded(config, ranks):
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process group exists already")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Iteration:
    def __init__(
        self, config: Config, world: World, family: ModelFamily, meter: Meter, whole: bool, loaded: int
    ) -> None:
        # Bytes of the trained components as they are loaded.
        self.loaded = loaded
        self.config, self.world, self.family, self.meter, self.whole = config, world, family, meter, whole
        self.phases: list[Phase] = []

    def run(self, frozen: dict[str, nn.Module] | None) -> DryRun:
        config, family, world, meter = self.config, self.family, self.world, self.meter
        for layer in quantized_layers(family.policy):
            layer.dequantize = _unpacked
        waiting = set(family.visitors)
        family.visitors = {name: _PlannedVisitor(v.module, v.device, meter) for name, v in family.visitors.items()}
        with meter.counting("parameters"):
            for name, part in family.pipeline.components.items():
                # Text encoders stay on the device, as they do in a run that keeps them.
                if isinstance(part, nn.Module) and name not in family.modules and name not in waiting:
                    materialize(part)
        if config.model.text_encoders == "drop":
            # Before weights are sharded, and there is an optimizer.
            with meter.counting("parameters"):
                loaded = torch.empty(self.loaded, dtype=torch.uint8)
            with self.phase("encode", "activations"), family.encoding():
                del loaded
        held = [family.policy, *(frozen or {}).values()]
        meter.claim((t for m in held for t in (*m.parameters(), *m.buffers())), "parameters")
        with meter.counting("optimizer"):
            optimizer = OptimizerState(family.policy, config.update, 1, _PlannedAdamW8bit)
        meter.claim(optimizer.ema or (), "ema")
        kept = residency(config, family.policy, world)
        roll = config.rollout
        samples = roll.prompts_per_iteration * roll.candidates
        plan = plan_rollout(roll, family.noise_levels(roll.steps, roll.shift), samples, 0, config.run.seed)
        mine = np.sort(rank_samples(samples, config.update.optimizer_steps, world.size, world.rank).reshape(-1))
        layout = lay_out(plan, roll, mine)
        with meter.counting("caches"):
            conditioning = fake_conditioning(family, len(layout.prompts))
        reference = None
        if config.objective.kl_weight:
            reference = _without_lora(family) if frozen is None else lambda: nullcontext(frozen)
        updater = _Updater(family, config, world, optimizer, reference, kept)
        updater.meter, updater.whole = meter, self.whole

        if config.model.text_encoders == "offload":
            with self.phase("encode", "activations"), family.encoding():
                pass
        predict = _Repeated(meter, family.predict, "activations", self.whole)
        with (
            self.phase("rollout", "trajectories"),
            gathered(family.modules.values(), kept.rollout_gathered),
            _replaced(family, "predict", predict),
        ):
            trajectory = rollout(family, plan, layout, conditioning, roll, config.run.seed, 0)
        decoded = _Repeated(meter, family.decode, "activations", self.whole, runs=1)
        with self.phase("decode", "decoded"), _replaced(family, "decode", decoded):
            images = decode(family, trajectory.latents, roll.decode_batch)
        del images
        with self.phase("update", "activations"):
            advantages = np.where(np.arange(samples) % 2 == 0, 1.0, -1.0)
            # Of best-of-N's candidates a group is trained, whichever it is.
            trained = np.arange(samples) % roll.candidates < roll.group_size
            updater.run(plan, trajectory, conditioning, advantages, trained, 0)
        trainable = [p for p in family.policy.parameters() if p.requires_grad]
        return DryRun(
            self.phases,
            predict.rows,
            updater.rows,
            parameter_count(family.policy),
            sum(p.numel() for p in trainable),
            meter.live["optimizer"] + meter.live["ema"] + sum(_held(p) for p in trainable),
            kept,
        )

    @contextmanager
    def phase(self, name: str, category: str) -> Iterator[None]:
        self.meter.new_peak()
        before = self.meter.cost.copy()
        with self.meter.counting(category):
            yield
        self.phases.append(Phase(name, self.meter.cost - before, self.meter.peak, self.meter.at_peak))


class _PlannedVisitor(Visitor):
    """Makes the weights of a module on the meta device, and takes them away again."""

    def __init__(self, module: nn.Module, device: torch.device, meter: Meter) -> None:
        super().__init__(module, device)
        self.meter = meter

    def _arrive(self) -> None:
        self.host = {number: holder[name] for number, holder, name in self._places()}
        with self.meter.counting("parameters"):
            materialize(self.module)


class _PlannedAdamW8bit(AdamW8bit):
    """Its moments are made as a run makes them; bitsandbytes' kernel, which takes no memory, is left out."""

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(256, device=device), torch.empty(256, device=device)

    def _update(self, *_: Any) -> None:
        pass


def _unpacked(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What bitsandbytes dequantizes to, without bitsandbytes."""
    return torch.empty(shape, dtype=dtype, device=packed.device)


class _Repeated:
    """Stands for a method of the family whose calls cost the same: it is run `runs` times for each component, and the
    last of these calls' cost counts for those that follow. rows: of all calls."""

    def __init__(self, meter: Meter, method: Callable[..., Tensor], category: str, whole: bool, runs: int = 2) -> None:
        self.meter, self.method, self.category, self.whole, self.runs = meter, method, category, whole, runs
        self.calls: dict[int, int] = {}
        self.last: dict[int, tuple[Cost, Counter[str], tuple[int, ...], torch.dtype]] = {}
        self.rows = 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.rows += len(x)
        key = id(rest[2]) if len(rest) > 2 else 0
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] > self.runs and not self.whole:
            cost, more, shape, dtype = self.last[key]
            self.meter.cost.add(cost)
            self.meter.swell(more)
            return torch.empty(shape, dtype=dtype)
        before = self.meter.cost.copy()
        category = self.meter.category
        with self.meter.counting(self.category), self.meter.transient() as more:
            output = self.method(x, *rest)
        self.meter.claim([output], category)
        self.last[key] = self.meter.cost - before, more, tuple(output.shape), output.dtype
        return output


class _Updater(Updater):
    """The trainer's update, where of equal micro-batches in a row two are run, and of optimizer steps two."""

    meter: Meter
    whole: bool
    begin: Cost
    step_cost: Cost
    rows = 0

    def _choose(self, plan: RolloutPlan, layout: Layout, worth: np.ndarray, k: int) -> list[MicroBatch]:
        chosen = super()._choose(plan, layout, worth, k)
        self.rows += sum(len(micro.rows) for micro in chosen)
        if self.whole:
            return chosen
        if k == 2:
            # The second step's cost, its optimizer included.
            self.step_cost = self.meter.cost - self.begin
        if k > 1:
            self.meter.cost.add(self.step_cost)
            return []
        self.begin = self.meter.cost.copy()
        return _Thinned(chosen, self)


class _Thinned(list):
    """Micro-batches of an optimizer step, iterated over with what is left out multiplied."""

    def __init__(self, chosen: list[MicroBatch], updater: _Updater) -> None:
        self.updater = updater
        runs: list[list[MicroBatch]] = []
        for micro in chosen:
            if runs and _kind(runs[-1][0]) == _kind(micro):
                runs[-1].append(micro)
            else:
                runs.append([micro])
        self.times = [1 if i == 0 else len(run) - 1 for run in runs for i in range(min(len(run), 2))]
        super().__init__(micro for run in runs for micro in run[:2])

    def __iter__(self) -> Iterator[MicroBatch]:
        meter, updater = self.updater.meter, self.updater
        for micro, times in zip(super().__iter__(), self.times, strict=True):
            before = meter.cost.copy()
            yield micro
            meter.cost.add(meter.cost - before, times - 1)
            meter.claim(_gradients(updater.family.policy), "gradients")


def _kind(micro: MicroBatch) -> tuple[str, int, bool]:
    return micro.module, micro.pairs.shape[1], micro.syncs


def _gradients(policy: nn.Module) -> Iterator[Tensor]:
    for parameter in policy.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    if parameter.unsharded_accumulated_grad is not None:
                        yield parameter.unsharded_accumulated_grad


def _held(parameter: Tensor) -> int:
    from fastgrpo.parallel import local

    shard = local(parameter)
    return shard.numel() * shard.element_size()


@contextmanager
def _replaced(family: ModelFamily, method: str, by: Any) -> Iterator[None]:
    setattr(family, method, by)
    try:
        yield
    finally:
        delattr(family, method)


def _without_lora(family: ModelFamily) -> Any:
    @contextmanager
    def reference() -> Iterator[None]:
        with family.lora_disabled():
            yield

    return reference


def materialize(module: nn.Module) -> None:
    """Gives a module on the meta device parameters and buffers on the CPU, of the mode that is active."""
    # A parameter may stand in several places (tied embeddings).
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if id(p) not in made:
                    empty = torch.empty(p.shape, dtype=p.dtype, device=CPU)
                    made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                part._parameters[name] = made[id(p)]
        for name, p in part._buffers.items():
            if p is not None:
                part._buffers[name] = torch.empty(p.shape, dtype=p.dtype, device=CPU)


def fake_conditioning(family: ModelFamily, prompts: int) -> Conditioning:
    """Encoded prompts of the longest text that the config allows."""
    tensors: dict[str, Tensor] = {}
    for name, shape in encoded_shapes(family).items():
        dtype = torch.bool if name == "mask" else family.dtype
        tensors[name] = torch.empty(prompts, *shape, dtype=dtype)
        if family.guided:
            tensors[f"negative_{name}"] = torch.empty(prompts, *shape, dtype=dtype)
    lengths = np.full(prompts, family.config.max_sequence_length)
    names = [n for base in family.host_names for n in (base, f"negative_{base}")]
    return Conditioning(tensors, dict.fromkeys(names, lengths))
