"""Kernel tests run Triton on the GPU where there is one, and in the Triton interpreter on CPU tensors otherwise.

The interpreter is chosen before triton is imported; tests that compile ahead of time run in a process of their own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
