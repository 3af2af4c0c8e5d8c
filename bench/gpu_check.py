"""The stages of bench/gpu_check.sh that need code: numbers, times and hazards that no CPU can show.

python -m bench.gpu_check STAGE [--cpu]    --cpu: on tiny sizes, without what needs a GPU

Each finding is printed at once, as JSON, and appended to gpu_check.jsonl in the folder $OUT. A stage that finds
something wrong finishes, says so, and exits with 1.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastgrpo_kernels as fk
from fastgrpo_kernels import _launch
from fastgrpo_kernels.clipped_loss.reference import (
    awm_log_prob_reference,
    clipped_loss_reference,
    nft_loss_reference,
)
from fastgrpo_kernels.log_prob.reference import log_prob_reference

from . import device_time, kernels, providers, tables

CPU = "--cpu" in sys.argv
DEVICE = torch.device("cpu" if CPU else "cuda")
OUT = Path(os.environ.get("OUT", "."))
TINY, FLUX, HUNYUAN = (2, 16, 64), (12, 4096, 64), (8, 16, 14, 60, 104)
# A size of many blocks to a row, and one that no block divides.
ODD = [(3, 5, 137)] if CPU else [(3, 5, 1237), (2, 16, 14, 60, 104)]
# Largest error of a result in a dtype, relative to its norm: half a unit in its last place, rounded up.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Share of a copy's bandwidth that the loss has to reach, forward alone and with its gradient.
OF_COPY = {"flux": 0.7, "hunyuan": 0.8}
RACES = 2 if CPU else 300
# Of objectives against a target.
TIME, BETA, ADVANTAGE_CLIP = 0.7, 1.0, 5.0

started = time.monotonic()
wrong: list[str] = []


def tell(stage: str, **row: Any) -> None:
    """Print a finding, and keep it."""
    text = json.dumps({"stage": stage, "at_s": round(time.monotonic() - started, 1), **row}, default=str)
    print(text, flush=True)
    with (OUT / "gpu_check.jsonl").open("a") as file:
        file.write(text + "\n")


def expect(holds: bool, what: str) -> None:
    """Note what is wrong unless it holds; the stage goes on."""
    if not holds:
        wrong.append(what)
        print(f"WRONG: {what}", flush=True)


class Case:
    """One set of inputs, and every operation on it: `forward` without a gradient, `gradient` of the outputs' sum."""

    def __init__(self, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def randn() -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        self.x, v = randn(), randn()
        self.v_old = (v + 0.01 * randn()).to(dtype)
        self.v = v.to(dtype)
        self.a, self.b, self.s = (float(c) for c in fk.transitions.dance_sde(0.7, 0.65, 0.3))
        self.key = fk.noise_key(seed, torch.arange(shape[0]), 3, 0, fk.STREAM_SDE, DEVICE)
        self.eps = fk.normal(self.key, shape[1:])
        self.y = fk.gaussian_step(self.x, self.v_old, self.a, self.b, self.s, self.key)
        self.advantages = torch.linspace(-1, 1, shape[0], device=DEVICE)
        # For x as clean latents.
        self.target = fk.MatchingTarget(self.x, self.key)

    def step(self, v: Tensor) -> Tensor:
        return fk.gaussian_step(self.x, v, self.a, self.b, self.s, self.key)

    def rollout(self, v: Tensor) -> Tensor:
        out = fk.gaussian_step(self.x, v.detach(), self.a, self.b, self.s, self.key, return_all=True)
        assert out.log_prob is not None
        return out.log_prob

    def log_prob(self, v: Tensor) -> Tensor:
        return fk.log_prob(self.x, v, self.y, self.a, self.b, self.s)

    def moments(self, v: Tensor) -> Tensor:
        P, Q = fk.shift_moments(v, self.v_old, self.b, self.s, self.key)
        return P - Q / 2

    def loss(self, v: Tensor, clip: float = 1e-4) -> Tensor:
        weight, key = 1.0 / len(v), self.key
        return fk.grpo_loss(v, self.v_old, self.b, self.s, key, self.advantages, weight, clip_low=clip, clip_high=clip)[
            0
        ]

    def matching(self, v: Tensor) -> Tensor:
        rows = self.target, self.advantages, 1.0 / len(v)
        return fk.grpo_loss(v, self.v_old, TIME, TIME, *rows, clip_low=0.5, clip_high=0.5, ratio="matching")[0]

    def nft(self, v: Tensor) -> Tensor:
        rows = self.target, self.advantages, 1.0 / len(v)
        return fk.nft_loss(v, self.v_old, TIME, *rows, beta=BETA, advantage_clip=ADVANTAGE_CLIP)[0]

    def on_policy(self, v: Tensor) -> Tensor:
        return fk.on_policy_gradient(self.advantages, self.b, self.s, self.key, v.shape, v.dtype)

    def gradient(self, operation: Callable[[Tensor], Tensor], scale: float = 1.0) -> Tensor:
        leaf = self.v.clone().requires_grad_()
        return torch.autograd.grad(scale * operation(leaf).sum(), leaf)[0]


OPERATIONS = ("step", "rollout", "log_prob", "moments", "loss", "matching", "nft", "on_policy")
DIFFERENTIABLE = ("step", "log_prob", "moments", "loss", "matching", "nft")


def environment() -> None:
    import triton

    row = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if not CPU:
        expect(torch.cuda.is_available(), "torch sees no GPU")
        found = torch.cuda.get_device_properties(0)
        row |= {"gpu": found.name, "memory_gib": found.total_memory >> 30, "l2_mib": found.L2_cache_size >> 20}
        row |= {"multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda}
    tell("environment", **row)


def numerics() -> None:
    """Every operation against float64 of the same inputs, forward and gradient, at odd sizes, in every dtype."""
    for shape in ODD:
        for dtype, rounding in ROUNDING.items():
            case = Case(shape, 11, dtype)
            bounds = {"log_ratio": 1e-9, "log_prob": 2e-6, "step": 1e-6}
            bounds |= dict.fromkeys(("gradient", "matching", "nft", "on_policy"), rounding)
            errors = {name: _error(case, name) for name in bounds}
            tell("numerics", shape=shape, dtype=str(dtype), **errors)
            for name, bound in bounds.items():
                expect(errors[name] <= bound, f"{name} of {list(shape)} {dtype}: {errors[name]:.1e} > {bound:.0e}")
            same = Case(shape, 11, dtype)
            same.v_old = same.v
            expect(not same.moments(same.v).any(), f"{list(shape)} {dtype}: the ratio of equal outputs is not 1")


def _error(case: Case, name: str) -> float:
    """Of a result: the largest for log-ratio and log-probability, relative to the largest value for a step, and to the
    norm for gradients, which are scaled by a sample's elements, for float16 has no smaller numbers."""
    elements = case.v[0].numel()
    v, v_old, eps, x, y = (t.double() for t in (case.v, case.v_old, case.eps, case.x, case.y))
    d = case.b / case.s * (v - v_old)
    if name == "log_ratio":
        P, Q = ((d * eps).flatten(1).mean(1), d.square().flatten(1).mean(1))
        found = fk.shift_moments(case.v, case.v_old, case.b, case.s, case.key)
        # A unit in the last place of Q/2 is what float32 can tell of it.
        slack = torch.finfo(torch.float32).eps * Q / 2
        error = (found[0].double() - found[1].double() / 2 - (P - Q / 2)).abs() - slack
        return max(float(error.max()), 0.0)
    if name == "log_prob":
        rows = (torch.full((len(v),), c, dtype=torch.float64, device=DEVICE) for c in (case.a, case.b, case.s))
        expected = log_prob_reference(x, v, y, *rows)
        return float(((case.log_prob(case.v).double() - expected) / expected).abs().max())
    if name == "step":
        expected = case.a * x + case.b * v + case.s * eps
        return float((case.step(case.v).double() - expected).abs().max() / expected.abs().max())
    if name == "on_policy":
        expected = -case.advantages.double().view(-1, *[1] * (v.ndim - 1)) * case.b / case.s * eps
        found = fk.on_policy_gradient(
            case.advantages * elements, case.b, case.s, case.key, case.v.shape, case.v.dtype
        ).double()
        return float((found - expected).norm() / expected.norm())
    leaf, advantages = v.clone().requires_grad_(), case.advantages.double()
    weight, time = torch.full_like(advantages, 1.0 / len(v)), torch.full_like(advantages, TIME)
    outputs = leaf.flatten(1), v_old.flatten(1), (eps - x).flatten(1)
    if name == "nft":
        positive = (advantages / ADVANTAGE_CLIP).clamp(-1, 1) / 2 + 0.5
        loss = nft_loss_reference(*outputs, time, positive, weight, beta=BETA, clip=ADVANTAGE_CLIP)
        found = case.gradient(case.nft, elements)
    elif name == "matching":
        new, old = (awm_log_prob_reference(output, outputs[2], time, "t") for output in outputs[:2])
        # A log-ratio is P - Q/2 of P alone.
        loss = clipped_loss_reference(
            new - old, torch.zeros_like(new), time, advantages, weight, clip_low=0.5, clip_high=0.5
        )
        found = case.gradient(case.matching, elements)
    else:
        d = case.b / case.s * (leaf - v_old)
        P, Q = (d * eps).flatten(1).mean(1), d.square().flatten(1).mean(1)
        loss = clipped_loss_reference(P, Q, time, advantages, weight, clip_low=0.5, clip_high=0.5)
        found = case.gradient(lambda v: case.loss(v, 0.5), elements)
    (expected,) = torch.autograd.grad(elements * loss, leaf)
    return float((found.double() - expected).norm() / expected.norm())


def host() -> None:
    """Host time of a call beside eager PyTorch's: all that there is where the device is not kept busy."""
    inputs = providers.Inputs(TINY if CPU else (4, 1024, 64), torch.bfloat16, DEVICE)
    for op, operation in providers.OPERATIONS.items():
        for mode in operation.modes:
            works = {name: providers.prepare(op, name, mode, inputs) for name in ("ours", "eager")}
            micros = {name: round(1e6 * median(device_time.host_times(work)), 1) for name, work in works.items()}
            tell("host", op=op, mode=mode, **{f"{name}_us": value for name, value in micros.items()})
            if not CPU:
                expect(micros["ours"] <= micros["eager"], f"{op} {mode}: ours takes the host longer than eager")


def device() -> None:
    """Rows of `bench kernels` for ours and eager PyTorch, written to $OUT as they come."""
    rows = _bench(None, ["ours", "eager"], None)
    for row in rows:
        if CPU or row["provider"] != "ours" or row["op"] != "loss" or row["mode"] not in ("no_grad", "full"):
            continue
        name, least = f"loss {row['mode']} {row['shape']}", OF_COPY[row["shape"]]
        expect(row["of_copy"] >= least, f"{name}: {row['of_copy']:.2f} of a copy's bandwidth, less than {least}")
        _expect_faster(row, rows, "eager", 8.0)


def inductor() -> None:
    """The loss as trainers write it, compiled, beside the rows of `device`."""
    rows = _bench(["loss"], ["compile"], ["no_grad", "full"])
    for row in tables.read(OUT / f"kernels-{tables.device_slug()}.csv"):
        if not CPU and row["provider"] == "ours" and row["op"] == "loss" and row["mode"] in ("no_grad", "full"):
            _expect_faster(row, rows, "compile", 1.5)


def _bench(ops: list[str] | None, chosen: list[str], modes: list[str] | None) -> list[tables.Row]:
    if CPU:
        providers.SHAPES["flux"], kernels.COPY_BYTES = TINY, 1 << 16
    table, failed, rows = OUT / f"kernels-{tables.device_slug()}.csv", [], []
    for row in kernels.measure(ops, ["flux"] if CPU else ["flux", "hunyuan"], chosen, modes, 3 if CPU else 20, failed):
        tables.upsert(table, [row], kernels.KEY, kernels.COLUMNS)
        tell("device", **{name: row[name] for name in (*kernels.KEY, "p50_ms", "host_us", "of_copy", "launches")})
        rows.append(row)
    for what in failed:
        expect(False, f"not measured: {what}")
    return rows


def _expect_faster(row: tables.Row, rows: list[tables.Row], other: str, times: float) -> None:
    """Of a row of ours: the same of another provider takes at least so many times as long."""
    same = {"op": row["op"], "mode": row["mode"], "shape": row["shape"], "provider": other}
    found = [float(r["p50_ms"]) for r in rows if same.items() <= r.items()]
    ratio = found[0] / float(row["p50_ms"]) if found else math.nan
    name = f"{row['op']} {row['mode']} {row['shape']}"
    tell("device", op=name, times_as_fast_as=other, ratio=round(ratio, 2))
    expect(ratio >= times, f"{name}: {ratio:.1f} × as fast as {other}, less than {times}")


def races() -> None:
    """The same bits 300 times, while another stream saturates the memory: a missed fence would move them."""
    case = Case(TINY if CPU else FLUX, 5)
    firsts = {name: getattr(case, name)(case.v) for name in ("moments", "loss", "nft", "log_prob", "rollout")}
    busy = torch.empty(1 << (10 if CPU else 28), dtype=torch.int8, device=DEVICE)
    side = None if CPU else torch.cuda.Stream()
    different = dict.fromkeys(firsts, 0)
    for _ in range(RACES):
        if side is not None:
            with torch.cuda.stream(side):
                busy.add_(1)
        for name, first in firsts.items():
            different[name] += int(not torch.equal(getattr(case, name)(case.v), first))
    tell("races", runs=RACES, different=different)
    expect(not any(different.values()), f"bits differ from run to run: {different}")
    _counters("races")


def compiled() -> None:
    """Every operation under torch.compile, by default and with CUDA graphs, and in a captured graph: eager's bits."""
    case = Case(TINY if CPU else FLUX, 5)
    for mode in ("default",) if CPU else ("default", "reduce-overhead"):
        for name in OPERATIONS:
            torch.compiler.reset()
            operation = getattr(case, name)
            try:
                run = torch.compile(operation, mode=mode, fullgraph=True)
                with torch.no_grad():
                    equal = [_same(run(case.v).clone(), operation(case.v)) for _ in range(4)]
                if name in DIFFERENTIABLE:
                    equal += [_same(case.gradient(run), case.gradient(operation)) for _ in range(4)]
                tell("compiled", mode=mode, op=name, equal=equal)
                expect(all(equal), f"{name} under torch.compile, {mode}: not eager's bits")
            except Exception as error:
                expect(False, f"{name} under torch.compile, {mode}: {type(error).__name__}: {str(error)[:300]}")
    torch.compiler.reset()
    for name in () if CPU else OPERATIONS:
        try:
            equal = _captured(case, name)
            tell("captured", op=name, equal=equal)
            expect(all(equal), f"{name} in a captured graph: not eager's bits")
        except Exception as error:
            expect(False, f"{name} in a captured graph: {type(error).__name__}: {str(error)[:300]}")
    _counters("compiled")


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal to the bit; on a CPU, where Inductor compiles the formula itself, to rounding."""
    if not CPU:
        return torch.equal(found, expected)
    distance = (found.double() - expected.double()).norm()
    return bool(distance <= ROUNDING[expected.dtype] * expected.double().norm())


def _captured(case: Case, name: str) -> list[bool]:
    """Whether replays of an operation's graph, of inputs that change in between, give eager's bits."""
    operation = getattr(case, name)

    def both() -> list[Tensor]:
        with torch.no_grad():
            outputs = [operation(case.v)]
        return outputs + ([case.gradient(operation)] if name in DIFFERENTIABLE else [])

    with device_time.side_stream(DEVICE):
        both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = both()
        equal = []
        for _ in range(3):
            case.v.mul_(0.99)
            graph.replay()
            equal += [torch.equal(found, expected) for found, expected in zip(kept, both(), strict=True)]
    return equal


def _counters(stage: str) -> None:
    """The counters that launches share are zero again."""
    left = [int(torch.count_nonzero(counters)) for counters in _launch._arrivals.values()]
    tell(stage, counters_left=left)
    expect(not any(left), f"arrival counters are not zero after {stage}: {left}")


def moments() -> None:
    """Three calls of the shift moments at HunyuanVideo's size, for a profiler to look at."""
    case = Case(TINY if CPU else HUNYUAN, 5)
    for _ in range(3):
        case.moments(case.v)


def run(directory: str) -> None:
    """What a finished training run shows: the first ratio is exactly 1, the loss is finite, the reward moves."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "reward/mean" in row]
    rewards = [row["reward/mean"] for row in rows]
    deviations = [row["ratio/first_max_deviation"] for row in rows]
    seconds = {name: round(rows[-1][name], 3) for name in rows[-1] if name.startswith("time/")}
    tell("run", directory=directory, rewards=rewards, first_max_deviation=deviations, **seconds)
    expect(len(rows) >= 2, f"{directory}: {len(rows)} iterations")
    expect(not any(deviations), f"{directory}: the first ratio is off by {max(deviations)}")
    expect(len(set(rewards)) > 1 and all(map(math.isfinite, rewards)), f"{directory}: rewards {rewards}")


STAGES = {f.__name__: f for f in (environment, numerics, host, device, inductor, races, compiled, moments)}


def main(arguments: Sequence[str]) -> int:
    """Run a stage by its name, or `run DIRECTORY`; 1 where something is wrong."""
    names = [argument for argument in arguments if argument != "--cpu"]
    OUT.mkdir(parents=True, exist_ok=True)
    if names[:1] == ["run"] and len(names) == 2:
        run(names[1])
    elif len(names) == 1 and names[0] in STAGES:
        STAGES[names[0]]()
    else:
        print(f"gpu_check: unknown stage {' '.join(names)!r}; one of: {', '.join(STAGES)}, run DIRECTORY")
        return 2
    for what in wrong:
        print(f"WRONG: {what}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
