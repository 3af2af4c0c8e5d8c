"""Operators as trainers run them on a device: compiled, captured in CUDA graphs, on any of several devices.

Without a GPU the kernels run in Triton's interpreter on CPU tensors. What CUDA graphs do to a call is emulated: memory
that belongs to a pool, launches that are recorded, and replays on the same memory, which others have overwritten.
"""

import contextlib
import gc
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.kernel_cases import KERNEL_DEVICE, make_case, modules_with
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo_kernels import (
    MatchingTarget,
    NoiseKey,
    StoredStep,
    _launch,
    clipped_loss,
    gaussian_step,
    grpo_loss,
    log_prob,
    nft_loss,
    normal,
    on_policy_gradient,
    shift_moments,
)

# More than one block a row.
SHAPE = (3, 3, 700)
CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 2e-3}
ALL = {"dual_clip": 1.5, "dppo_threshold": 1e-3, "kl_weight": 0.1}


@pytest.fixture
def launch_path(monkeypatch):
    """Triton wherever the tensors are."""
    for module in modules_with("launches"):
        monkeypatch.setattr(module, "launches", lambda tensor: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def values():
    """Every tensor that a call takes, on the device, coefficients in float32."""
    case = make_case(SHAPE, torch.bfloat16)
    named = {name: getattr(case, name) for name in ("x", "v", "v_old", "eps")}
    named |= {name: getattr(case, name).float() for name in ("a", "b", "s")}
    named |= {"words": case.key.words, "v_reference": case.v_old.flip(2), "v_uncond": case.v_old.flip(1)}
    named |= {"y": case.x + 0.1 * case.eps, "P": 1e-3 * case.x[:, 0, 0], "Q": 1e-3 * case.x[:, 0, 1].square()}
    named |= {"advantages": torch.tensor([1.0, -0.7, 0.4]), "weight": torch.tensor([0.3, 0.4, 0.3])}
    return {name: value.to(KERNEL_DEVICE).contiguous() for name, value in named.items()}


def key(i):
    return NoiseKey(2**40, i["words"])


def step(i, **more):
    return gaussian_step(i["x"], i["v"], i["a"], i["b"], i["s"], key(i), **more)


def moments(i, noise, **more):
    return shift_moments(i["v"], i["v_old"], i["b"], i["s"], noise, **more)


def loss(i, noise, **more):
    total, found = grpo_loss(
        i["v"], i["v_old"], i["b"], i["s"], noise, i["advantages"], i["weight"], **CLIP, **more
    )  # fmt: skip
    return total, found.ratio, found.max_deviation


def clipped(i):
    total, found = clipped_loss(i["P"], i["Q"], i["s"], i["advantages"], i["weight"], **CLIP, ratio="unit")
    return total, found.clipped


def target(i):
    return MatchingTarget(i["x"], key(i), i["advantages"], i["weight"])


def nft(i, **more):
    rows = i["s"], target(i), i["advantages"], i["weight"]
    total, found = nft_loss(i["v"], i["v_old"], *rows, beta=0.7, advantage_clip=0.5, **more)
    return total, found.ratio, found.clipped


def guided(i):
    return {"v_uncond": i["v_uncond"], "guidance_scale": 3.0}


# Name: (call, what it is differentiated in).
CALLS = {
    "normal": (lambda i: [normal(key(i), SHAPE[1:])], ()),
    "gaussian_step": (lambda i: [step(i, **guided(i))], ("x", "v", "v_uncond")),
    "gaussian_step-all": (lambda i: list(step(i, **guided(i), return_all=True, clean=(1.0, -0.5))), ()),
    "shift_moments-key": (lambda i: moments(i, key(i)), ("v",)),
    "shift_moments-guided": (lambda i: moments(i, i["eps"], **guided(i)), ("v", "v_uncond")),
    "shift_moments-step": (lambda i: moments(i, StoredStep(i["x"], i["y"], i["a"])), ("v",)),
    "shift_moments-target": (lambda i: moments(i, target(i), residuals=0.7), ("v",)),
    "log_prob": (lambda i: [log_prob(i["x"], i["v"], i["y"], i["a"], i["b"], i["s"])], ("v",)),
    "clipped_loss": (clipped, ("P", "Q")),
    "grpo_loss-key": (lambda i: loss(i, key(i)), ("v",)),
    "grpo_loss-all": (lambda i: loss(i, i["eps"], **ALL, **guided(i), v_reference=i["v_reference"]), ("v", "v_uncond")),
    "grpo_loss-huber": (lambda i: loss(i, target(i), ratio="huber"), ("v",)),
    "nft_loss": (lambda i: nft(i, **guided(i), v_reference=i["v_reference"], kl_weight=0.1), ("v", "v_uncond")),
    "on_policy_gradient": (lambda i: [on_policy_gradient(i["advantages"], i["b"], i["s"], key(i), SHAPE)], ()),
}
# Of calls whose operators differ in arguments alone, one is registered and captured in every run of the tests.
VARIANTS = ("gaussian_step-all", "shift_moments-guided", "shift_moments-step", "shift_moments-target",
            "grpo_loss-huber", "grpo_loss-all", "nft_loss")  # fmt: skip
OPERATORS = [pytest.param(n, marks=pytest.mark.full) if n in VARIANTS else n for n in CALLS]


def run(call, inputs, leaves):
    """(outputs, gradients) of a call."""
    inputs = {n: t.clone().requires_grad_() if n in leaves else t for n, t in inputs.items()}
    outputs = list(call(inputs))
    if leaves:
        roots = [o for o in outputs if o.requires_grad]
        torch.autograd.backward(roots, [torch.full_like(o, 0.5) for o in roots])
    return [o.detach() for o in outputs], [inputs[name].grad for name in leaves]


@pytest.mark.parametrize("name", list(CALLS))
def test_compile_equals_eager(name, launch_path):
    call, leaves = CALLS[name]
    expected, gradients = run(call, values(), leaves)
    found, compiled = run(torch.compile(call, fullgraph=True), values(), leaves)
    for a, b in zip(found + compiled, expected + gradients, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert len(gradients) == len(leaves)


def operator_calls(call, inputs, leaves):
    """Arguments of every operator of the package that the traced call runs, forward and backward."""
    found = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastgrpo_kernels":
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch:
        for module in modules_with("is_eager"):
            patch.setattr(module, "is_eager", lambda *tensors: False)
        with Seen():
            run(call, inputs, leaves)
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_registration(name, launch_path):
    """opcheck, of forward and backward operators, where they launch."""
    calls = operator_calls(CALLS[name][0], values(), CALLS[name][1])
    # The gradient of the Gaussian step is a product, that of the clipped loss is its forward's.
    assert len(calls) == 1 + bool(
        CALLS[name][1] and name.split("-")[0] in ("shift_moments", "log_prob", "grpo_loss", "nft_loss")
    )
    for operator, arguments in calls:
        plain = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(plain))


class Graph(TorchDispatchMode):
    """Stands for a CUDA graph and its memory pool: owns what is allocated, and records what is launched."""

    def __init__(self):
        super().__init__()
        self.owned, self.memory, self.work = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(made, torch.Tensor) or made.untyped_storage()._cdata in given:
                continue
            self.owned.append(StorageWeakRef(made.untyped_storage()))
            self.memory.append(made.untyped_storage())
            if "empty" not in func.name():
                self.work.append((made, lambda made=made: made.copy_(func(*args, **(kwargs or {})))))
        return result

    def launch(self, kernel, programs, device, *args, **constants):
        _launch_for_real(kernel, programs, device, *args, **constants)
        self.work.append((args, lambda: _launch_for_real(kernel, programs, device, *args, **constants)))

    def live(self):
        """Addresses of the storages that somebody still holds."""
        gc.collect()
        return {storage.cdata for storage in self.owned if not storage.expired()}

    def replay(self):
        """Everything again, on memory that holds what others left there."""
        for storage in self.memory:
            torch.empty(0, dtype=torch.uint8, device=KERNEL_DEVICE).set_(storage).fill_(0x7F)
        for _, again in self.work:
            again()


_launch_for_real = _launch.launch


@contextlib.contextmanager
def recorded(graph):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), graph:
        for module in modules_with("launch"):
            patch.setattr(module, "launch", graph.launch)
        yield


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_captures_and_replays(name, launch_path, monkeypatch):
    """What torch.compile's graph trees do with an operator: run it in the pool, check that nothing of the pool is left
    but its results, capture it there, replay it on other inputs."""
    calls = operator_calls(CALLS[name][0], values(), CALLS[name][1])
    for operator, arguments in calls:
        # The first call on this device and stream.
        monkeypatch.setattr(_launch, "_arrivals", {})
        static = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        # A dispatch mode does not see into an operator.
        body = OPDEFS[operator.name()]._init_fn
        warm = Graph()
        with recorded(warm):
            result = body(*static)
        results = result if isinstance(result, tuple) else (result,)
        warm.memory.clear()
        warm.work.clear()
        assert warm.live() <= {t.untyped_storage()._cdata for t in results}

        graph = Graph()
        with recorded(graph):
            result = body(*static)
        assert graph.memory
        assert graph.work
        results = result if isinstance(result, tuple) else (result,)
        for factor in (1.0, -0.5):
            changed = [
                a * factor if isinstance(a, torch.Tensor) and a.ndim > 1 and a.is_floating_point() else a
                for a in static
            ]
            expected = operator(*changed)
            for held, new in zip(static, changed, strict=True):
                if isinstance(held, torch.Tensor):
                    held.copy_(new)
            for _ in range(2):
                graph.replay()
                for a, b in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
                    assert torch.equal(a, b)


class Kernel:
    """A stand-in for a Triton kernel: notes the device that is current when it is launched."""

    def __init__(self, state):
        self.state, self.seen = state, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.append((grid, self.state.device))


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    state = SimpleNamespace(device=0, changes=0)

    @contextlib.contextmanager
    def device(other):
        before, state.device, state.changes = state.device, other.index, state.changes + 1
        yield
        state.device = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Kernel(state)
    for index in (0, 1, 0):
        _launch.launch(kernel, 7, torch.device("cuda", index), num_warps=4)
    assert kernel.seen == [((7,), 0), ((7,), 1), ((7,), 0)]
    # Where the device is the current one nothing is entered.
    assert state.changes == 1
    assert state.device == 0


SPECIALIZED = """
import importlib, pkgutil, fastgrpo_kernels as package
from triton.runtime.jit import JITFunction
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    for name, value in vars(importlib.import_module(module.name)).items():
        if name.endswith("_kernel") and isinstance(value, JITFunction):
            print(name, *(p.name for p in value.params if not (p.is_constexpr or p.do_not_specialize)))
"""


def test_a_number_of_blocks_is_no_reason_to_compile_again():
    import os

    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALIZED], capture_output=True, text=True, check=True, env=environment
    )
    kernels = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(kernels) >= 7
    for specialized in kernels.values():
        assert not {"blocks", "batch", "seed_low", "seed_high"} & set(specialized.split())
