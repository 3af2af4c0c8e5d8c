"""The package stands alone: it imports and runs on CPU tensors with triton, diffusers and transformers blocked."""

import subprocess
import sys

BLOCKED = """
import sys
for name in ("triton", "diffusers", "transformers", "numpy"):
    sys.modules[name] = None
import torch
import fastgrpo_kernels as fk
v = torch.randn(2, 3, 8)
key = fk.noise_key(1, [0, 1], 0, 0, fk.STREAM_SDE, "cpu")
w = v.clone().requires_grad_()
p, q = fk.shift_moments(w, v + 0.1, -0.1, 0.2, key)
(p + q).sum().backward()
y = fk.gaussian_step(v, v, 1.0, -0.1, 0.2, key)
assert y.isfinite().all() and w.grad.any() and fk.log_prob(v, v, y, 1.0, -0.1, 0.2).isfinite().all()
assert "fastgrpo" not in sys.modules
"""


def test_runs_with_optional_packages_blocked():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_exported_exist():
    import fastgrpo_kernels

    assert all(hasattr(fastgrpo_kernels, name) for name in fastgrpo_kernels.__all__)
