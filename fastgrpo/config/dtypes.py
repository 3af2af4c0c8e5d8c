"""The settings' dtypes as torch has them; the only part of this room that imports torch."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
