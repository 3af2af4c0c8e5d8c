"""One iteration of a config by the trainer's own code on fake tensors and a fake process group: what each phase costs.

Evaluations of the model that cost the same are run once and multiplied, and so are blocks that are alike
(depth.py beside this file); a test proves that this changes no figure. Nothing is allocated, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from fastgrpo.algorithms.layout import Layout, lay_out, rank_samples, share_out, sharers
from fastgrpo.algorithms.schedule import StepSchedule, schedule_steps
from fastgrpo.config import Config
from fastgrpo.distributed.fsdp import unsharded
from fastgrpo.distributed.world import World, check_world, make_world, sharded
from fastgrpo.errors import ConfigError
from fastgrpo.models import Conditioning, ModelFamily
from fastgrpo.models.architectures import build_family
from fastgrpo.models.nf4 import parameter_count, quantized_layers
from fastgrpo.models.placement import OffloadedModule
from fastgrpo.models.trainable import reference_of
from fastgrpo.planning.depth import SHORT, Stack, Stretches, deep_cost, deep_number, deep_peaks, shorten, stacks_of
from fastgrpo.planning.meter import Cost, Meter, Peaks
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.sampler import rollout
from fastgrpo.training.adamw_8bit import AdamW8bit
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.residency import Residency, decide_residency, kept_bytes
from fastgrpo.training.update import MicroBatch, Updater
from fastgrpo.training.weights import prepare_weights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """at_peak: bytes of live tensors by category, at most; peaks: of each stretch, as the meter has them."""

    name: str
    cost: Cost
    at_peak: dict[str, int]
    peaks: Peaks = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


@dataclass(frozen=True)
class DryRun:
    """phases: of one iteration of rank 0. forwards, trained: rows that it evaluates without and with gradients.
    parameters, trainable: of the whole model. state: bytes that a checkpoint copies to the host, of this
    rank; host: the most that it holds there besides."""

    phases: list[Phase]
    forwards: int
    trained: int
    parameters: int
    trainable: int
    state: int
    host: int
    residency: Residency


def dry_run(config: Config, ranks: int = 1, local: int | None = None, memory: int = 0, whole: bool = False) -> DryRun:
    """An iteration of rank 0 of `ranks`, `local` on a node, on devices of `memory` bytes (0: not known).

    whole: every block of every model evaluation is run, none is multiplied. Raises ConfigError, as the trainer would.
    """
    check_world(config, ranks, local or ranks)
    if config.parallel.context > 1 and config.parallel.context_kind == "ring":
        raise ConfigError("parallel.context_kind: ring attention cannot be planned without a GPU; plan it as ulysses")
    # Planned as PyTorch's own attention, whose cost other backends share, and as blocks that are not compiled.
    plain = {"attention_backend": None, "compile": "none"}
    config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
    with _process_group(config, ranks):
        world = replace(make_world(config, ranks, 0, CPU), memory=memory)
        family = build_family(config.model)
        stacks = [] if whole else stacks_of(family, config)
        short = [SHORT] * len(stacks)
        depths = [short, *([*short[:i], SHORT + 1, *short[i + 1 :]] for i in range(len(stacks)))]
        families = [family, *(build_family(config.model) for _ in depths[1:])]
        parts = [_Iteration(config, world, f, stacks, depth, whole) for f, depth in zip(families, depths, strict=True)]
        more = [stack.length - SHORT for stack in stacks]
        needs = [kept_bytes(config, f.policy) for f in families]
        resident, gradients = (deep_number(numbers, more) for numbers in zip(*needs, strict=True))
        kept = decide_residency(config, resident, gradients, memory)
        decoded: dict[int, Any] = {}
        return _deep([part.run(kept, decoded) for part in parts], more)


def _deep(runs: list[DryRun], more: list[int]) -> DryRun:
    """What the whole depth costs, of runs at the short depth and with one block more of each stack."""
    phases = []
    for same in zip(*(run.phases for run in runs), strict=True):
        live = deep_peaks([phase.peaks for phase in same], more)
        phases.append(Phase(same[0].name, deep_cost([phase.cost for phase in same], more), live))
    numbers = {
        name: deep_number([getattr(run, name) for run in runs], more) for name in ("parameters", "trainable", "state")
    }
    return replace(runs[0], phases=phases, **numbers)


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
    """An iteration of a family of which `lengths` blocks of each stack are left; made with its weights ready."""

    def __init__(
        self, config: Config, world: World, family: ModelFamily, stacks: list[Stack], lengths: list[int], whole: bool
    ) -> None:
        self.config, self.world, self.family, self.whole = config, world, family, whole
        self.phases: list[Phase] = []
        self.meter, self.mode = Meter(), FakeTensorMode(allow_non_fake_inputs=True)
        family.device = CPU
        shorten(family, stacks, lengths)
        policy = family.policy
        whole_weights = (*policy.parameters(), *policy.buffers()) if config.parallel.load == "whole" else ()
        # Bytes of the trained components as they are loaded.
        self.loaded = sum(t.numel() * t.element_size() for t in whole_weights)

        def fill(module: nn.Module) -> None:
            with self.mode:
                materialize(module)

        self.frozen = prepare_weights(family, config, world, fill)
        self.stretches = Stretches(self.meter, family, stacks, lengths)
        # Outside the mode: schedulers read their tensors.
        self.levels = family.noise_levels(config.rollout.steps, config.rollout.shift)

    def run(self, kept: Residency, decoded: dict[int, Any]) -> DryRun:
        """decoded: what decoding cost, kept between iterations of the same pipeline at other depths."""
        with self.mode, self.meter:
            return self._run(kept, decoded)

    def _run(self, kept: Residency, decoded: dict[int, Any]) -> DryRun:
        config, family, world, meter, frozen = self.config, self.family, self.world, self.meter, self.frozen
        for layer in quantized_layers(family.policy):
            layer.dequantize = _unpacked
        offloaded = set(family.offloaded)
        family.offloaded = {name: _PlannedOffload(m.module, m.device, meter) for name, m in family.offloaded.items()}
        with meter.counting("parameters"):
            for name, part in family.pipeline.components.items():
                # Text encoders stay on the device, as they do in a run that keeps them.
                if isinstance(part, nn.Module) and name not in family.modules and name not in offloaded:
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
        roll = config.rollout
        samples = roll.prompts_per_iteration * roll.candidates
        plan = schedule_steps(roll, self.levels, samples, 0, config.run.seed)
        mine = np.sort(rank_samples(samples, config.update.optimizer_steps, world.size, world.rank).reshape(-1))
        layout = lay_out(plan, roll, mine)
        with meter.counting("caches"):
            conditioning = fake_conditioning(family, len(layout.prompts))
        reference = None
        if config.objective.kl_weight:
            reference = reference_of(family.policy, frozen)
        updater = _Updater(family, config, world, optimizer, reference, kept)
        updater.meter, updater.stretches, updater.whole = meter, self.stretches, self.whole

        if config.model.text_encoders == "offload":
            with self.phase("encode", "activations"), family.encoding():
                pass
        predict = _Repeated(self, family.predict)
        family.host_empty = self._host_empty
        with (
            self.phase("rollout", "trajectories"),
            unsharded(family.modules.values(), kept.rollout_unsharded),
            _replaced(family, "predict", predict),
        ):
            trajectory = rollout(family, plan, layout, conditioning, roll, config.run.seed, 0)
        decoding = _Repeated(self, family.decode, runs=1, last=decoded)
        with self.phase("decode", "decoded"), _replaced(family, "decode", decoding):
            share = share_out(np.arange(len(trajectory.latents)), sharers(roll, world.context), 0)
            images = decode(family, trajectory.latents[: len(share)], roll.decode_batch)
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
            meter.host,
            kept,
        )

    def _host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.meter.counting("host"):
            return torch.empty(shape, dtype=dtype)

    @contextmanager
    def phase(self, name: str, category: str) -> Iterator[None]:
        self.meter.new_peaks()
        self.stretches.enter(name)
        before = self.meter.cost.copy()
        with self.meter.counting(category):
            yield
        self.phases.append(Phase(name, self.meter.cost - before, self.meter.at_peak, dict(self.meter.peaks)))


class _PlannedOffload(OffloadedModule):
    """Makes the weights of a module on the meta device, and takes them away again."""

    def __init__(self, module: nn.Module, device: torch.device, meter: Meter) -> None:
        super().__init__(module, device)
        self.meter = meter

    def _copy_to_device(self) -> None:
        self.host = {number: holder[name] for number, holder, name in self._tensors()}
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
    last of these calls' cost counts for those that follow. rows: of all calls. last: of a call that has been run."""

    def __init__(
        self, iteration: _Iteration, method: Callable[..., Tensor], runs: int = 2, last: dict[int, Any] | None = None
    ) -> None:
        self.meter, self.stretches, self.whole = iteration.meter, iteration.stretches, iteration.whole
        self.method, self.runs = method, runs
        self.calls: dict[int, int] = {}
        self.last: dict[int, tuple[Cost, Peaks, tuple[int, ...], torch.dtype]] = {} if last is None else last
        self.shared = last is not None
        self.rows = 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.rows += len(x)
        key = id(rest[2]) if len(rest) > 2 else 0
        call = self.calls[key] = self.calls.get(key, 0) + 1
        known = key in self.last and (self.shared or call > self.runs)
        if known and not self.whole:
            cost, more, shape, dtype = self.last[key]
            self.meter.cost.add(cost)
            self.meter.swell(more)
            return torch.empty(shape, dtype=dtype)
        before, outside = self.meter.cost.copy(), self.stretches.call
        category = self.meter.category
        self.stretches.enter(self.method.__name__, list(self.calls).index(key), min(call, self.runs))
        with self.meter.counting("activations"), self.meter.transient() as more:
            output = self.method(x, *rest)
        self.stretches.enter(*outside)
        self.meter.claim([output], category)
        self.last[key] = self.meter.cost - before, more, tuple(output.shape), output.dtype
        return output


class _Updater(Updater):
    """The trainer's update, where micro-batches that cost the same are run once, and so are optimizer steps."""

    meter: Meter
    stretches: Stretches
    whole: bool
    rows = 0
    # What a step is made of, and its cost.
    _made_of: list[Any] | None = None
    _begin: Cost
    _cost: Cost | None = None

    def _choose(self, plan: StepSchedule, layout: Layout, worth: np.ndarray, k: int) -> list[MicroBatch]:
        chosen = super()._choose(plan, layout, worth, k)
        self.rows += sum(len(micro.rows) for micro in chosen)
        if self.whole:
            return _Thinned(chosen, self)
        if self._made_of is not None and self._cost is None:
            # The step before has ended, its optimizer included.
            self._cost = self.meter.cost - self._begin
        made_of = [self.kind(micro) for micro in chosen]
        if made_of == self._made_of and self._cost is not None:
            self.meter.cost.add(self._cost)
            return []
        self._made_of, self._begin, self._cost = made_of, self.meter.cost.copy(), None
        return _Thinned(chosen, self)

    def kind(self, micro: MicroBatch) -> tuple[str, int, bool]:
        """Micro-batches of one kind cost the same, but for a step's first."""
        matters = self.residency.sync_once or self.residency.update_unsharded
        return micro.module, micro.pairs.shape[1], micro.syncs and matters


class _Thinned(list):
    """Micro-batches of an optimizer step, iterated over with what is left out counted: of each component the first one,
    and then one of each kind, are run, or all of a whole run."""

    def __init__(self, chosen: list[MicroBatch], updater: _Updater) -> None:
        super().__init__(chosen)
        self.updater = updater

    def __iter__(self) -> Iterator[MicroBatch]:
        meter, updater, stretches = self.updater.meter, self.updater, self.updater.stretches
        begun: set[str] = set()
        known: dict[Any, Cost] = {}
        for micro in super().__iter__():
            kind = updater.kind(micro)
            if kind in known and not updater.whole:
                meter.cost.add(known[kind])
                continue
            before, first = meter.cost.copy(), micro.module not in begun
            stretches.enter("micro-batch", kind, first)
            yield micro
            meter.claim(_gradients(updater.family.policy), "gradients")
            if not first:
                known[kind] = meter.cost - before
            begun.add(micro.module)
        stretches.enter("optimizer")


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
    from fastgrpo.distributed.shards import local

    shard = local(parameter)
    return shard.numel() * shard.element_size()


@contextmanager
def _replaced(family: ModelFamily, method: str, by: Any) -> Iterator[None]:
    setattr(family, method, by)
    try:
        yield
    finally:
        delattr(family, method)


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
    for name, shape in family.encoded_shapes().items():
        dtype = torch.bool if name in family.mask_names else family.dtype
        tensors[name] = torch.empty(prompts, *shape, dtype=dtype)
        if family.guided:
            tensors[f"negative_{name}"] = torch.empty(prompts, *shape, dtype=dtype)
    lengths = np.full(prompts, family.config.max_sequence_length)
    names = [n for base in family.host_names for n in (base, f"negative_{base}")]
    return Conditioning(tensors, dict.fromkeys(names, lengths))
