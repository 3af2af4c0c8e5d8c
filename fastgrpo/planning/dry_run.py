"""One iteration of a config by the trainer's own code on fake tensors and a fake process group: what each phase costs.

Evaluations of the model that cost the same are run once and multiplied, and so are blocks that are alike
(depth.py beside this file); a test proves that this changes no figure. Nothing is allocated, whatever the model's size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.layout import lay_out, rank_samples, share_out, sharers
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.config import Config, Update
from fastgrpo.distributed.adamw_8bit import AdamW8bit
from fastgrpo.distributed.fsdp import unsharded
from fastgrpo.distributed.residency import Residency, decide_residency, kept_bytes
from fastgrpo.distributed.shards import local_bytes
from fastgrpo.distributed.world import World, check_world, make_world, sharded
from fastgrpo.errors import ConfigError
from fastgrpo.models import Conditioning, ModelFamily
from fastgrpo.models.architectures import build_family
from fastgrpo.models.nf4 import parameter_count, quantized_layers
from fastgrpo.models.placement import Memory
from fastgrpo.planning.depth import SHORT, Stack, Stretches, deep_cost, deep_number, deep_peaks, shorten, stacks_of
from fastgrpo.planning.meter import Cost, Meter, Peaks
from fastgrpo.planning.repeated import CountedWalk, Repeated
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.sampler import rollout
from fastgrpo.rollout.trajectory import Trajectory, kept_empty
from fastgrpo.training.forward import ForwardTraining
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.replay import KeptRollout, Replay
from fastgrpo.training.update import Updater
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
    """phases: of one iteration of rank 0. forwards, trained: rows that it rolls out, and that it evaluates with
    gradients; compared: those that other policies evaluate in its update. parameters, trainable: of the whole model.
    state: bytes that a checkpoint copies to the host, of this rank; host: the most that it holds there besides.
    loading: bytes of what it loads into host memory before it is sharded or on the device. encoders: parameters of the
    text encoders."""

    phases: list[Phase]
    forwards: int
    trained: int
    compared: int
    parameters: int
    trainable: int
    state: int
    host: int
    residency: Residency
    loading: int = 0
    encoders: int = 0


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
    with _process_group(config, ranks), warnings.catch_warnings():
        # FSDP2's, of views that blocks return: nothing is changed in place here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        world = replace(make_world(config, ranks, 0, CPU), memory=memory)
        family = build_family(config.model)
        stacks = [] if whole else stacks_of(family, config)
        short = [SHORT] * len(stacks)
        depths = [short, *([*short[:i], SHORT + 1, *short[i + 1 :]] for i in range(len(stacks)))]
        families = [family, *(build_family(config.model) for _ in depths[1:])]
        parts = [_Iteration(config, world, f, stacks, depth, whole) for f, depth in zip(families, depths, strict=True)]
        more = [stack.length - SHORT for stack in stacks]
        needs = [kept_bytes(config, part.family.policy, part.copies.old_modules()) for part in parts]
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
        name: deep_number([getattr(run, name) for run in runs], more)
        for name in ("parameters", "trainable", "state", "loading")
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
        others = {n: m for n, m in family.pipeline.components.items() if isinstance(m, nn.Module)}
        others = {name: module for name, module in others.items() if name not in family.modules}
        # NF4 is made of weights that were loaded in the compute dtype.
        read = parameter_count(policy) * family.dtype.itemsize if quantized_layers(policy) else self.loaded
        self.loading = read + sum(p.numel() * p.element_size() for m in others.values() for p in m.parameters())
        self.encoders = sum(p.numel() for n, m in others.items() if n in family.encoders for p in m.parameters())

        def fill(module: nn.Module) -> None:
            with self.mode:
                materialize(module)

        self.copies = prepare_weights(family, config, world, fill)
        self.stretches = Stretches(self.meter, family, stacks, lengths)
        # Outside the mode: schedulers read their tensors.
        self.levels = family.noise_levels(config.rollout.steps, config.rollout.shift)

    def run(self, kept: Residency, decoded: dict[int, Any]) -> DryRun:
        """decoded: what decoding cost, kept between iterations of the same pipeline at other depths."""
        with self.mode, self.meter:
            return self._run(kept, decoded)

    def _run(self, kept: Residency, decoded: dict[int, Any]) -> DryRun:
        config, family, world, meter, copies = self.config, self.family, self.world, self.meter, self.copies
        family.memory = _PlannedMemory(meter)
        with meter.counting("parameters"):
            for name, part in family.pipeline.components.items():
                # Text encoders stay on the device, as they do in a run that keeps them.
                if isinstance(part, nn.Module) and name not in family.modules and name not in family.offloaded:
                    materialize(part)
        if config.model.text_encoders == "drop":
            # Before weights are sharded, and there is an optimizer. What is trained has been loaded whole, and waits in
            # host memory meanwhile.
            with self.phase("encode", "activations"):
                self.stretches.enter("load")
                with meter.counting("parameters"):
                    loaded = torch.empty(self.loaded, dtype=torch.uint8)
                del loaded
                self.stretches.enter("encode")
                with family.encoding():
                    pass
        held = [family.policy, *copies.modules()]
        meter.claim((t for m in held for t in (*m.parameters(), *m.buffers())), "parameters")
        with meter.counting("optimizer"):
            update = _given_rate(config.update)
            optimizer = OptimizerState(
                family.policy, update, 1, _PlannedAdamW8bit, config.model.dtype == "float16", copies.old
            )
        meter.claim(optimizer.ema or (), "ema")
        roll = config.rollout
        samples = roll.prompts_per_iteration * roll.candidates
        schedule = schedule_steps(
            roll, self.levels, samples, 0, config.run.seed, forward=config.objective.forward
        )  # fmt: skip
        mine = np.sort(rank_samples(samples, config.update.optimizer_steps, world.size, world.rank).reshape(-1))
        layout = lay_out(schedule, roll, mine)
        with meter.counting("caches"):
            conditioning = fake_conditioning(family, len(layout.prompts))
        counted = meter, self.stretches, self.whole
        walk = CountedWalk(*counted, family.policy, kept)
        forward = None
        if config.objective.forward:
            repeated = partial(Repeated, *counted)
            forward = ForwardTraining(family, config, world, self.levels, copies, kept.update_unsharded, repeated)
        updater = Updater(family, config, world, optimizer, copies.reference, kept, walk, forward)

        if config.model.text_encoders == "offload":
            with self.phase("encode", "activations"), family.encoding():
                pass
        predict, decoding = Repeated(*counted, family.predict), Repeated(*counted, family.decode, runs=1, last=decoded)
        whole = unsharded(family.modules.values(), kept.rollout_unsharded)
        with self.phase("rollout", "trajectories"), whole:
            trajectory = rollout(family, schedule, layout, conditioning, roll, config.run.seed, 0, predict)
        with self.phase("decode", "decoded"):
            share = share_out(np.arange(len(trajectory.latents)), sharers(roll, world.context), 0)
            images = decode(family, trajectory.latents[: len(share)], roll.decode_batch, decoding)
        del images
        with self.phase("update", "activations"):
            terms = np.where(np.arange(samples) % 2 == 0, 1.0, -1.0)
            # Of best-of-N's candidates a group is trained, whichever it is.
            trained = np.arange(samples) % roll.candidates < roll.group_size
            flat = np.zeros(roll.prompts_per_iteration, dtype=bool)
            advantages = Advantages(terms, terms[:, None], trained, flat)
            batch = Batch(0, mine, schedule, trajectory, conditioning)
            replay = self._replay(optimizer, KeptRollout(batch, advantages, trained, None))
            updater.run(batch, advantages, config.objective.kl_weight, replay)
        trainable = [p for p in family.policy.parameters() if p.requires_grad]
        return DryRun(
            self.phases,
            predict.rows,
            walk.rows,
            walk.compared,
            parameter_count(family.policy),
            sum(p.numel() for p in trainable),
            meter.live["optimizer"]
            + meter.live["ema"]
            + sum(local_bytes(p) for p in (*trainable, *(copies.old.parameters if copies.old else ()))),
            meter.host,
            kept,
            self.loading,
            self.encoders,
        )

    def _replay(self, optimizer: OptimizerState, kept: KeptRollout) -> Replay:
        """A replay that is full: the same rollout again and again, each with the bytes of its own."""
        replay, trajectory = Replay(self.config.update.replay, optimizer), kept.batch.trajectory
        for _ in range(replay.size - 1):
            with self.meter.counting("trajectories"):
                copies: dict[str, Any] = {
                    name: None if part is None else kept_empty(self.family, self.config.rollout, part.shape, part.dtype)
                    for name, part in vars(trajectory).items()
                    if name != "layout"
                }
            with self.meter.counting("parameters"):
                old = replay.keep(kept.batch, kept.advantages, kept.chosen)
            assert old is not None
            batch = replace(kept.batch, trajectory=Trajectory(trajectory.layout, **copies))
            replay.earlier.append(replace(old, batch=batch))
        return replay

    @contextmanager
    def phase(self, name: str, category: str) -> Iterator[None]:
        self.meter.new_peaks()
        self.stretches.enter(name)
        before = self.meter.cost.copy()
        with self.meter.counting(category):
            yield
        self.phases.append(Phase(name, self.meter.cost - before, self.meter.at_peak, dict(self.meter.peaks)))


def _given_rate(update: Update) -> Update:
    """With a number where the rate finds itself: its forwards are not of every iteration."""
    if update.optimizer.lr != "auto":
        return update
    return update.model_copy(update={"optimizer": update.optimizer.model_copy(update={"lr": 1e-5})})


class _PlannedMemory(Memory):
    """Makes tensors without values where a run has them, and counts them."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        with self.meter.counting("host"):
            return torch.empty(shape, dtype=dtype)

    def on_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        with self.meter.counting("parameters"):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)


class _PlannedAdamW8bit(AdamW8bit):
    """Its moments are made as a run makes them; bitsandbytes' kernel, which takes no memory, is left out."""

    def byte_values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(256, device=device), torch.empty(256, device=device)

    def update_shard(self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], step: int, lr: float) -> None:
        pass


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
        dtype = torch.bool if name == "mask" else family.dtype
        tensors[name] = torch.empty(prompts, *shape, dtype=dtype)
        if family.guided:
            tensors[f"negative_{name}"] = torch.empty(prompts, *shape, dtype=dtype)
    lengths = np.full(prompts, family.config.max_sequence_length)
    names = [n for base in family.host_names for n in (base, f"negative_{base}")]
    return Conditioning(tensors, dict.fromkeys(names, lengths))
