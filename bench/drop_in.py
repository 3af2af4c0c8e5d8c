"""A training step's loss in other trainers before and after the lines of docs/drop-in.md: gradient, operations, time.

python bench/drop_in.py FOLDER    FOLDER holds clones of DanceGRPO, flow_grpo and Flow-Factory (their commits: COMMITS)

Their step functions are run as they stand in those clones, on this CPU, beside those of fastgrpo_kernels.compat.
"""

from __future__ import annotations

import ast
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo_kernels import transitions
from fastgrpo_kernels.compat import dance_grpo, ddpo, flow_factory, flow_grpo
from fastgrpo_kernels.log_prob.reference import log_prob_reference

COMMITS = {"DanceGRPO": "15cc71d", "flow_grpo": "ac4c86e", "Flow-Factory": "a0b2bc5"}
CLIP, REPEATS = 1e-4, 15

# A step function of (model output, latents before, latents after), and its log-probability in float64.
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


def functions_of(file: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Functions and classes of a source file, methods too, without importing what else is in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    found: list[ast.stmt] = [node for node in definitions if node.name in names]
    module = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *found], [])
    space = {"torch": torch, "math": math, "logger": logging.getLogger("drop-in"), **known}
    exec(compile(ast.fix_missing_locations(module), str(file), "exec"), space)
    return space


def cases(folder: Path) -> dict[str, tuple[tuple[int, ...], LogProb, LogProb, LogProb]]:
    """Of each trainer: latents' shape, the log-probability of its code, of ours in its place, and in float64."""
    from diffusers import DDIMScheduler
    from diffusers.utils.torch_utils import randn_tensor

    sigmas = torch.linspace(1, 0, 17)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    index, timesteps = torch.tensor(6), 1000 * sigmas[:-1]
    flow = SimpleNamespace(sigmas=sigmas, timesteps=timesteps)
    flow.index_for_timestep = lambda t: int((timesteps == t).nonzero()[0, 0])
    flow.is_eval, flow.dynamics_type = False, "Flow-SDE"
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    ddim.set_timesteps(50)
    alphas = ddim.alphas_cumprod
    level, level_next = float(sigmas[6]), float(sigmas[7])
    t = torch.tensor([501])

    dance = functions_of(folder / "DanceGRPO/fastvideo/train_grpo_flux.py", "flux_step")["flux_step"]
    ddim_file = folder / "DanceGRPO/fastvideo/models/stable_diffusion/ddim_with_logprob.py"
    names = "ddim_step_with_logprob", "_get_variance", "_left_broadcast"
    sd = functions_of(ddim_file, *names, randn_tensor=randn_tensor, DDIMScheduler=DDIMScheduler)[
        "ddim_step_with_logprob"
    ]
    sd3_file = folder / "flow_grpo/flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
    sd3 = functions_of(sd3_file, "sde_step_with_logprob", randn_tensor=randn_tensor)["sde_step_with_logprob"]
    factory_folder = folder / "Flow-Factory/src/flow_factory"
    broadcast = functions_of(factory_folder / "utils/base.py", "to_broadcast_tensor")["to_broadcast_tensor"]
    factory_file = factory_folder / "scheduler/flow_match_euler_discrete.py"
    output = SimpleNamespace(from_dict=lambda d: SimpleNamespace(**d))
    known = {"randn_tensor": randn_tensor, "to_broadcast_tensor": broadcast, "SDESchedulerOutput": output}
    factory = functions_of(factory_file, "step", List=list, **known)["step"]

    def float64(step: transitions.Transition) -> LogProb:
        return lambda v, x, y: log_prob_reference(x, v, y, *(torch.tensor([float(c)]).double() for c in step))

    sde = float64(transitions.flow_sde(level, level_next, 0.7, float(sigmas[1])))
    after_ddim = transitions.ddim(float(alphas[501]), float(alphas[481]), 1.0)
    wanted: dict[str, Any] = {"timestep_next": timesteps[7:8], "noise_level": 0.7, "return_kwargs": ["log_prob", "dt"]}

    def factory_here(v: Tensor, x: Tensor, y: Tensor) -> Any:
        return flow_factory.step(flow, v, timesteps[6:7], x, y, **wanted)

    return {
        "DanceGRPO, FLUX at 720²": (
            (1, 2025, 64),
            lambda v, x, y: dance(v, x, 0.3, sigmas, index, y, True, True)[2],
            lambda v, x, y: dance_grpo.flux_step(v, x, 0.3, sigmas, index, y, True, True)[2],
            float64(transitions.dance_sde(level, level_next, 0.3)),
        ),
        "DanceGRPO, Stable Diffusion": (
            (4, 4, 64, 64),
            lambda v, x, y: sd(ddim, v, t, x, 1.0, prev_sample=y)[1],
            lambda v, x, y: ddpo.ddim_step_with_logprob(ddim, v, t, x, 1.0, prev_sample=y)[1],
            float64(after_ddim),
        ),
        "Flow-GRPO, SD 3.5 at 512²": (
            (8, 16, 64, 64),
            lambda v, x, y: sd3(flow, v, timesteps[6:7], x, 0.7, y)[1],
            lambda v, x, y: flow_grpo.sde_step_with_logprob(flow, v, timesteps[6:7], x, 0.7, y)[1],
            sde,
        ),
        "Flow-Factory, FLUX at 512²": (
            (4, 1024, 64),
            lambda v, x, y: factory(flow, v, timesteps[6:7], x, y, **wanted).log_prob,
            lambda v, x, y: factory_here(v, x, y).log_prob,
            sde,
        ),
    }


def loss(log_prob: Tensor, old: Tensor) -> Tensor:
    """The clipped loss as these trainers write it, for advantages that fall from 1."""
    advantages = torch.linspace(1.0, -1.0, len(old) + 1, dtype=old.dtype)[:-1]
    ratio = torch.exp(log_prob - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure(shape: tuple[int, ...], before: LogProb, after: LogProb, exact: LogProb) -> dict[str, float]:
    """Distances of gradients in float32, over the gradient's norm; operations of the first; CPU times of both, ms."""
    generator = torch.Generator().manual_seed(0)
    x, v, y, delta = (torch.randn(shape, generator=generator) for _ in range(4))
    y, moved = x + 0.05 * y, v + 1e-3 * delta

    def gradient(log_prob: LogProb, dtype: torch.dtype) -> Tensor:
        leaf, latents = moved.to(dtype).requires_grad_(), (x.to(dtype), y.to(dtype))
        with torch.no_grad():
            old = log_prob(v.to(dtype), *latents)
        return torch.autograd.grad(loss(log_prob(leaf, *latents), old), leaf)[0].double()

    exact_grad = gradient(exact, torch.float64)
    grads = [gradient(function, torch.float32) for function in (before, after)]
    row = {"between": float((grads[0] - grads[1]).norm() / exact_grad.norm())}
    for name, grad in zip(("before", "after"), grads, strict=True):
        row[f"{name}_to_float64"] = float((grad - exact_grad).norm() / exact_grad.norm())
    # Models give bfloat16.
    v, moved = v.bfloat16(), moved.bfloat16().requires_grad_()
    with _Operations() as operations:
        log_prob = before(moved, x, y)
        torch.autograd.grad(log_prob, moved, torch.empty_like(log_prob))
    row["operations"] = operations.count
    with torch.no_grad():
        olds = [function(v, x, y) for function in (before, after)]
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for function, old, seconds in zip((before, after), olds, times, strict=True):
            begin = time.process_time()
            torch.autograd.grad(loss(function(moved, x, y), old), moved)
            seconds.append(time.process_time() - begin)
    return row | {name: 1e3 * median(seconds) for name, seconds in zip(("before", "after"), times, strict=True)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, commit in COMMITS.items():
        found = subprocess.run(
            ["git", "-C", str(folder / name), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        if not found.startswith(commit):
            raise SystemExit(f"{name}: expected a clone at {commit}, got {found.strip()[:7]}")
    head = (
        "trainer",
        "gradient: between",
        "before to float64",
        "after to float64",
        "operations",
        "before ms",
        "after ms",
    )
    print(" | ".join(head))
    for name, case in cases(folder).items():
        row = measure(*case)
        errors = (f"{row[key]:.1e}" for key in ("between", "before_to_float64", "after_to_float64"))
        print(" | ".join([name, *errors, str(row["operations"]), f"{row['before']:.2f}", f"{row['after']:.2f}"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
