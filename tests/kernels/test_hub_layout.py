"""The layout for the hub's kernels: it loads, beside the installed package, and gives the same bits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In a process of its own: operators register once.
CODE = """
import sys
from pathlib import Path
import torch, fastgrpo_kernels
from kernels import get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert hub.__name__ != "fastgrpo_kernels" and sys.argv[1] in hub.__file__
x, v_old = torch.randn(2, 3, 16, 33, generator=torch.Generator().manual_seed(0))
a, b, s = hub.transitions.dance_sde(sigma=0.8, sigma_next=0.7, eta=0.3)

def run(package):
    key = package.noise_key(seed=0, sample=[0, 1, 2], step=5, iteration=0, stream=package.STREAM_SDE, device=x.device)
    y = package.gaussian_step(x, v_old, a, b, s, key)
    v = (v_old + 0.01).requires_grad_()
    loss, _ = package.grpo_loss(v, v_old, b, s, key, torch.tensor([1.0, -1.0, 0.5]), 1 / 3, clip_low=1.0, clip_high=1.0)
    loss.backward()
    return y, loss.detach(), v.grad

for ours, theirs in zip(run(fastgrpo_kernels), run(hub), strict=True):
    assert torch.equal(ours, theirs)
names = {name.partition("::")[0] for name in dir(torch.ops) if name.startswith("fastgrpo_kernels")}
print(sorted(names))
"""


def test_it_loads_beside_the_installed_package_and_gives_the_same_bits(tmp_path):
    package = importlib.util.find_spec("kernels")
    # Without it our folder of that name is found.
    if package is None or package.origin is None:
        pytest.skip("needs the package kernels")
    script = [sys.executable, ROOT / "kernels" / "hub_layout.py", tmp_path / "hub"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["torch-cuda", "torch-rocm", "torch-cpu"]
    text = "".join(path.read_text() for path in (tmp_path / "hub" / "build").rglob("*.py"))
    assert '"fastgrpo_kernels::' not in text
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "hub"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
