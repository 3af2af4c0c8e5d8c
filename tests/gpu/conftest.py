"""Inputs and bounds are those of the kernel tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
