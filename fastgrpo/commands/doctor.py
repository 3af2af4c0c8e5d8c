"""What this machine has and can do; and whether a config's rollout and update agree: `fastgrpo doctor [CONFIG]`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastgrpo import __version__
from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.layout import lay_out
from fastgrpo.algorithms.objectives import OBJECTIVES
from fastgrpo.algorithms.schedule import StepSchedule
from fastgrpo.config import Config, load_config
from fastgrpo.distributed.world import this_machine
from fastgrpo.errors import EXTRAS
from fastgrpo.observe.timers import peak_memory_bytes
from fastgrpo.planning.plan import resolved
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.sampler import rollout
from fastgrpo.training.trainer import Trainer

GIB = 2**30


@dataclass(frozen=True)
class SelfTest:
    """One rollout and one update of one prompt's group, at the run's forward shape.

    log_ratio: max |log-ratio| before the first optimizer step, where the policy has not moved. clip: the narrower side
    of the clip range, None where the objective clips no ratio. q_floor: the Q that rounding of the model output to
    model.dtype alone puts under any measured one, at the trained step where it is largest; None of a forward process,
    which trains no step.
    """

    log_ratio: float
    clip: float | None
    q_floor: float | None
    rollout_seconds: float
    update_seconds: float
    peak_bytes: int

    def findings(self, config: Config) -> Iterator[tuple[bool, str]]:
        """Sentences on what was found, each with whether it is as it should be."""
        text = f"max |log-ratio| on policy is {f'{self.log_ratio:.2g}' if self.log_ratio else 'exactly 0'}"
        remedy = ": rollout and update disagree; use model.dtype float32"
        if self.clip is not None:
            text += f", {self.log_ratio / self.clip:.1%} of the clip range {self.clip:g}"
            remedy += ", or widen objective.clip_low and clip_high"
        agrees = self.log_ratio <= (self.clip or 0.0) / 10
        yield agrees, text if agrees else text + remedy
        if self.q_floor is None:
            return
        floor = f"rounding of {config.model.dtype} puts {self.q_floor:.2g} under Q, {self.q_floor / 2:.2g} under a KL"
        threshold = config.objective.dppo_threshold
        if threshold is not None and threshold < 1.5 * self.q_floor:
            yield False, f"{floor}: objective.dppo_threshold {threshold:g} is below three times that, so it drops noise"
        else:
            yield True, floor


def examine(config_path: Path | None = None, overrides: Sequence[str] = ()) -> bool:
    """Prints the machine's table and, with a config, its self-test; whether nothing was found wrong."""
    console = Console()
    config = None if config_path is None else load_config(config_path, overrides)
    console.print(machine_table())
    if config is None:
        return True
    result = self_test(config)
    table = Table(title=f"{config_path} on policy", title_justify="left", show_header=False)
    well = True
    for good, text in result.findings(config):
        well &= good
        table.add_row("[green]ok[/green]" if good else "[red]no[/red]", text)
    rows = config.rollout.forward_batch
    cost = f"rollout {result.rollout_seconds:.2f} s, update {result.update_seconds:.2f} s, "
    table.add_row("", f"one prompt's group at {rows} rows: {cost}peak memory {result.peak_bytes / GIB:.2f} GiB")
    console.print(table)
    return well


def self_test(config: Config) -> SelfTest:
    """The on-policy self-test of a config, through the trainer's own rollout and update. Writes nothing that stays."""
    config = _shortened(config)
    with tempfile.TemporaryDirectory() as scratch:
        run = config.run.model_copy(update={"dir": str(Path(scratch, "run")), "resume": False})
        trainer = Trainer.from_config(resolved(config.model_copy(update={"run": run}), *this_machine()))
    rollouts = trainer.rollouts
    schedule = rollouts.generator.schedule(0)
    layout = lay_out(schedule, config.rollout, rollouts.mine)
    drawn = rollouts.sampler.at(0)
    conditioning = trainer.family.encode([rollouts.prompts[i] for i in drawn])
    _wait()
    begin = time.perf_counter()
    trajectory = rollout(trainer.family, schedule, layout, conditioning, config.rollout, config.run.seed, 0)
    _wait()
    middle = time.perf_counter()
    # Any advantages do: the ratio of the first optimizer step does not depend on them.
    terms = np.resize([1.0, -1.0], rollouts.samples)
    everyone = np.ones(rollouts.samples, dtype=bool)
    advantages = Advantages(terms, terms[:, None], everyone, np.zeros(len(drawn), dtype=bool))
    result = trainer.updater.run(Batch(0, drawn, schedule, trajectory, conditioning), advantages, trainer.kl_weight)
    _wait()
    end = time.perf_counter()
    deviation, floor = float(result.first.max_deviation), None
    if not config.objective.forward:
        v_old = trainer.family.of_policy(trajectory.v_old)
        floor = q_floor(v_old, layout.row_step, schedule, trainer.family.dtype)
    return SelfTest(
        log_ratio=float(-np.log1p(-min(deviation, 1.0 - 1e-12))),
        clip=clip_range(config),
        q_floor=floor,
        rollout_seconds=middle - begin,
        update_seconds=end - middle,
        peak_bytes=peak_memory_bytes(),
    )


def q_floor(v: Tensor, steps: np.ndarray, plan: StepSchedule, dtype: torch.dtype) -> float:
    """The largest, over trained steps, of (b/s)²·M[ulp(v)²]/6: what two independent roundings of v to `dtype` add to Q.

    v: model outputs [R, …] of `steps` [R]. A rounding error is uniform within ulp/2, its variance ulp²/12.
    """
    _, exponent = torch.frexp(v.float())
    ulp = torch.finfo(dtype).eps * torch.exp2(exponent.double() - 1)
    mean_square = (ulp.square() * (v != 0)).flatten(1).mean(dim=1).cpu().numpy()
    floors = [
        (plan.transitions[step].b / plan.transitions[step].s) ** 2 * mean / 6
        for step, mean in zip(steps, mean_square, strict=True)
    ]
    return float(max(floors))


def machine_table() -> Table:
    """Packages, devices, memory and extras, with what follows from each."""
    table = Table(title=f"fastgrpo {__version__}", title_justify="left")
    for column in ("", "found", "what follows"):
        table.add_column(column)
    for row in (*_system(), *_torch(), *_attention(), *_extras()):
        table.add_row(*row)
    return table


def _system() -> Iterator[tuple[str, str, str]]:
    yield "Python", platform.python_version(), f"{platform.system()} {platform.machine()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield "CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB memory", f"PyTorch uses {torch.get_num_threads()} threads"
    disk = shutil.disk_usage(".")
    yield "disk", f"{disk.free / GIB:.0f} of {disk.total / GIB:.0f} GiB free", "in this directory"
    compiler = shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if compiler and header:
        yield "C compiler", compiler, "torch.compile works; Triton can launch on a GPU"
    else:
        wanted = " ".join(name for name, there in (("build-essential", compiler), ("python3-dev", header)) if not there)
        yield "C compiler", compiler or "none", f"torch.compile and Triton on a GPU need: apt-get install {wanted}"


def _torch() -> Iterator[tuple[str, str, str]]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU build"
    yield "PyTorch", torch.__version__, build
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            dtypes = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            size = f"{about.name}, {about.total_memory / GIB:.0f} GiB"
            yield f"GPU {index}", size, f"compute capability {about.major}.{about.minor}, {dtypes}"
    else:
        yield "GPU", "none", "kernels take their CPU path; the embedded models are made for that"
    triton = _version("triton")
    runs = "kernels run on the GPU" if torch.cuda.is_available() else "waits for a GPU"
    yield "Triton", triton or "none", runs if triton else "kernels take their CPU path everywhere"
    backends = [
        name
        for name, there in (
            ("nccl", torch.distributed.is_nccl_available()),
            ("gloo", torch.distributed.is_gloo_available()),
        )
        if there
    ]
    yield "several ranks", ", ".join(backends) or "none", "torchrun --nproc-per-node N -m fastgrpo train …"


def _attention() -> Iterator[tuple[str, str, str]]:
    packages = {"flash-attn": "flash_attn", "xformers": "xformers", "hub kernels": "kernels"}
    there = [name for name, module in packages.items() if importlib.util.find_spec(module)]
    yield "attention", ", ".join(["native", *there]), "backends that diffusers' attention dispatcher can use"


def _extras() -> Iterator[tuple[str, str, str]]:
    for extra in dict.fromkeys(EXTRAS.values()):
        modules = [module for module, of in EXTRAS.items() if of == extra]
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        remark = f"pip install 'fastgrpo[{extra}]'" if absent else ""
        yield escape(f"[{extra}]"), f"lacks {', '.join(absent)}" if absent else "installed", escape(remark)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shortened(config: Config) -> Config:
    """One prompt's group and one optimizer step; the forward shape stays."""
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"prompts_per_iteration": 1}),
            "update": config.update.model_copy(update={"optimizer_steps": 1}),
            "eval": config.eval.model_copy(update={"every": 0}),
        }
    )


def clip_range(config: Config) -> float | None:
    """The narrower side of the range that ratios are clipped to; None where the objective clips none."""
    objective = config.objective
    if objective.forward and "clip_low" not in OBJECTIVES.load(objective.kind, "objective.kind").settings:
        return None
    return min(objective.clip_low, objective.clip_high)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
