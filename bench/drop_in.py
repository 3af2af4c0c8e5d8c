"""A training step's loss in other trainers before and after the lines of docs/drop-in.md: gradient, operations, time.

python bench/drop_in.py FOLDER [NAME …]    FOLDER holds clones of the projects (their commits: COMMITS), all or NAMEs

Their step functions, and the lines of their training loops that are a loss, are run as they stand in those clones, on
this CPU, beside those of fastgrpo_kernels.compat.
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
from fastgrpo_kernels.clipped_loss.reference import awm_log_prob_reference, nft_loss_reference
from fastgrpo_kernels.compat import awm, dance_grpo, ddpo, diffusion_nft, flow_factory, flow_grpo
from fastgrpo_kernels.log_prob.reference import log_prob_reference

COMMITS = {
    "DanceGRPO": "15cc71d",
    "flow_grpo": "ac4c86e",
    "Flow-Factory": "a0b2bc5",
    "DiffusionNFT": "24af555",
    "advantage_weighted_matching": "be51372",
}
CLIP, REPEATS = 1e-4, 15

# A step function of (model output, latents before, latents after), and its log-probability in float64.
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]
# A loss of (model output, old output, clean latents, noise, the two mixed at TIMES).
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TIMES = torch.tensor([0.95, 0.7, 0.4, 0.1]).view(-1, 1, 1, 1)


def functions_of(file: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Functions and classes of a source file, methods too, without importing what else is in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    found: list[ast.stmt] = [node for node in definitions if node.name in names]
    module = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *found], [])
    space = {"torch": torch, "math": math, "logger": logging.getLogger("drop-in"), **known}
    exec(compile(ast.fix_missing_locations(module), str(file), "exec"), space)
    return space


def statements_of(file: Path, first: str, last: str) -> list[ast.stmt]:
    """The statements of a block of a source file from the one that assigns `first` to the one that assigns `last`."""

    def assigns(node: ast.stmt, name: str) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else []
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)

    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            begin = next((i for i, statement in enumerate(block) if assigns(statement, first)), None)
            if begin is None:
                continue
            end = next((i for i, statement in enumerate(block) if i >= begin and assigns(statement, last)), None)
            if end is not None:
                return block[begin : end + 1]
    raise ValueError(f"{file}: has no block that assigns {first}, then {last}")


def loss_cases(folder: Path) -> dict[str, tuple[tuple[int, ...], Loss, Loss, Loss]]:
    """Of each project with a loss of its own: latents' shape, its lines, ours in their place, and in float64."""
    t, advantages = TIMES.flatten(), torch.tensor([1.0, -0.6, 7.0, -0.2])
    clip, beta = 5.0, 1.0

    nft_file = folder / "DiffusionNFT/scripts/train_nft_sd3.py"
    lines = ast.Module(statements_of(nft_file, "advantages_clip", "policy_loss"), [])
    nft_code = compile(ast.fix_missing_locations(lines), str(nft_file), "exec")
    nft_config = SimpleNamespace(beta=beta, train=SimpleNamespace(adv_clip_max=clip))

    def nft(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, mixed: Tensor) -> Tensor:
        # As its training loop has them.
        space: dict[str, Any] = {"torch": torch, "config": nft_config, "loss_terms": {}, "j_idx": 0}
        space |= {"train_sample_batch": {"advantages": advantages[:, None]}, "t_expanded": TIMES, "x0": x0}
        space |= {"xt": mixed, "forward_prediction": v, "old_prediction": v_old}
        exec(nft_code, space)
        return space["policy_loss"]

    def nft_exact(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, mixed: Tensor) -> Tensor:
        new, old, target = (tensor.flatten(1) for tensor in (v, v_old, noise - x0))
        r = advantages.double().clamp(-clip, clip) / clip / 2 + 0.5
        return nft_loss_reference(new, old, target, t, r, torch.full((4,), 0.25).double(), beta=beta, clip=clip)

    awm_file = folder / "advantage_weighted_matching/advantage_weighted_matching/scripts/train_sd3_awm.py"
    their_log_prob = functions_of(awm_file, "compute_log_prob_awm")["compute_log_prob_awm"]
    awm_config = SimpleNamespace(train=SimpleNamespace(cfg=False))

    def awm_theirs(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, mixed: Tensor) -> Tensor:
        def log_prob(output: Tensor) -> Tensor:
            more = None, None, awm_config, mixed, x0, noise, "huber"
            return their_log_prob(lambda **inputs: (output,), None, None, TIMES, *more)[0]

        with torch.no_grad():
            old = log_prob(v_old)
        return loss(log_prob(v), old, advantages)

    def awm_exact(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, mixed: Tensor) -> Tensor:
        target = (noise - x0).flatten(1)
        new, old = (awm_log_prob_reference(o.flatten(1), target, t.double(), "huber") for o in (v, v_old))
        return loss(new, old, advantages.double())

    return {
        "DiffusionNFT, SD 3.5 at 512²": (
            (4, 16, 64, 64),
            nft,
            lambda v, old, x0, noise, _: diffusion_nft.policy_loss(
                v, old, x0, noise, t, advantages, beta=beta, adv_clip_max=clip
            ),
            nft_exact,
        ),
        "AWM, SD 3.5 at 512², huber": (
            (4, 16, 64, 64),
            awm_theirs,
            lambda v, old, x0, noise, _: awm.policy_loss(
                v, old, x0, noise, t, advantages, weighting="huber", clip_range=CLIP
            ),
            awm_exact,
        ),
    }


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


def loss(log_prob: Tensor, old: Tensor, advantages: Tensor | None = None) -> Tensor:
    """The clipped loss as these trainers write it, for advantages that fall from 1 if none are given."""
    if advantages is None:
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


def measure_loss(shape: tuple[int, ...], before: Loss, after: Loss, exact: Loss) -> dict[str, float]:
    """As `measure`, of whole losses; operations are those of forward and backward."""
    generator = torch.Generator().manual_seed(0)
    v, x0, noise, delta = (torch.randn(shape, generator=generator) for _ in range(4))
    moved, mixed = v + 1e-2 * delta, (1 - TIMES) * x0 + TIMES * noise

    def gradient(function: Loss, dtype: torch.dtype) -> Tensor:
        leaf = moved.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf, *(x.to(dtype) for x in (v, x0, noise, mixed))), leaf)[0].double()

    exact_grad = gradient(exact, torch.float64)
    grads = [gradient(function, torch.float32) for function in (before, after)]
    row = {"between": float((grads[0] - grads[1]).norm() / exact_grad.norm())}
    for name, grad in zip(("before", "after"), grads, strict=True):
        row[f"{name}_to_float64"] = float((grad - exact_grad).norm() / exact_grad.norm())
    v, moved = v.bfloat16(), moved.bfloat16().requires_grad_()
    with _Operations() as operations:
        torch.autograd.grad(before(moved, v, x0, noise, mixed), moved)
    row["operations"] = operations.count
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for function, seconds in zip((before, after), times, strict=True):
            begin = time.process_time()
            torch.autograd.grad(function(moved, v, x0, noise, mixed), moved)
            seconds.append(time.process_time() - begin)
    return row | {name: 1e3 * median(seconds) for name, seconds in zip(("before", "after"), times, strict=True)}


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    wanted = names or tuple(COMMITS)
    for name in wanted:
        commit = COMMITS[name]
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
    rows: dict[str, dict[str, float]] = {}
    if {"DanceGRPO", "flow_grpo", "Flow-Factory"} <= {*wanted}:
        rows |= {name: measure(*case) for name, case in cases(folder).items()}
    if {"DiffusionNFT", "advantage_weighted_matching"} <= {*wanted}:
        rows |= {name: measure_loss(*case) for name, case in loss_cases(folder).items()}
    for name, row in rows.items():
        errors = (f"{row[key]:.1e}" for key in ("between", "before_to_float64", "after_to_float64"))
        print(" | ".join([name, *errors, str(row["operations"]), f"{row['before']:.2f}", f"{row['after']:.2f}"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
