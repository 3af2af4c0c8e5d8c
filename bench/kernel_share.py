"""The share of an iteration that the kernels can save of real models, by plan: the opening of docs/kernels.md.

python -m bench.kernel_share

An iteration's seconds are planned (bench/data/planned.csv, H100). Of the steps and losses in it, ours move the least
bytes, eager PyTorch the bytes of each of its operations (counted on the meta device); both at the published bandwidth.
Nothing here was measured on a device.
"""

from __future__ import annotations

import re
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import tables
from .devices import DEVICES
from .providers import loss_eager, step_eager

DOCUMENT = tables.ROOT / "docs" / "kernels.md"
MARKS = ("<!-- share table -->\n", "<!-- end of share table -->\n")
GPU, DEVICE = "h100", DEVICES["sm_90"]
HEAD = (
    "model", "iteration s, planned", "steps and losses ms, eager", "ours", "share saved", "launches, eager", "ours",
)  # fmt: skip
# Of a family's latents: channels, pixels to a latent, and frames after the first. LTX-2's sound is not counted.
LATENTS = {
    "stable_diffusion": (4, 8, 4), "flux2": (128, 16, 4), "qwen_image_2_1": (64, 16, 4),
    "hunyuan_video_1_5": (32, 16, 4), "ltx2": (128, 32, 8),
}  # fmt: skip
OTHERS = 16, 8, 4
# Bytes an element that ours move: of a step latents and output read, latents written; of a loss both outputs, twice,
# and the gradient.
OURS_STEP, OURS_LOSS = 4 + 2 + 4, (2 + 2) + (2 + 2 + 2)
OURS_LAUNCHES = {"step": 1, "loss": 2}


class Work(NamedTuple):
    """Elements of a sample's latents, and of an iteration: calls and samples of rollout steps and of losses."""

    elements: int
    step_calls: int
    step_samples: int
    loss_calls: int
    loss_samples: int


def work_of(row: tables.Row) -> Work:
    """What an iteration of a planned row does."""
    height, width, frames, prompts, group, steps, trained, batch = (
        int(number or 1)
        for number in re.match(
            r"(\d+)x(\d+)(?:x(\d+))?, (\d+)x(\d+) samples, (\d+) steps, (\d+) trained, batch (\d+)", row["shape"]
        ).groups()  # pyright: ignore[reportOptionalMemberAccess]
    )
    samples = prompts * group
    channels, stride, step = LATENTS.get(row["model"], OTHERS)
    elements = channels * (height // stride) * (width // stride) * ((frames - 1) // step + 1)
    pairs = samples * trained
    return Work(elements, steps * ceil(samples / batch), steps * samples, ceil(pairs / batch), pairs)


class _Traffic(TorchDispatchMode):
    """Operations that do work, and the bytes that each reads and writes."""

    launches = 0
    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.launches += 1
            touched = tree_leaves((args, kwargs, out))
            self.moved += sum(t.nbytes for t in touched if isinstance(t, Tensor))
        return out


def eager() -> dict[str, tuple[float, int]]:
    """(bytes an element, launches) of a step and of a loss with its gradient, as trainers write them."""
    shape = (8, 4096, 64)

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    x, v, y = meta(*shape), meta(*shape, dtype=torch.bfloat16), meta(*shape)
    with _Traffic() as step:
        step_eager(x, v, None)
    leaf, old, advantages = v.clone().requires_grad_(), meta(shape[0]), meta(shape[0])
    with _Traffic() as loss:
        torch.autograd.grad(loss_eager(x, leaf, y, old, advantages), leaf)
    return {name: (t.moved / x.numel(), t.launches) for name, t in (("step", step), ("loss", loss))}


def document() -> str:
    """docs/kernels.md with the table between its marks."""
    (step_bytes, step_launches), (loss_bytes, loss_launches) = eager().values()
    lines = []
    for row in tables.read(tables.DATA / "planned.csv"):
        if row["gpu"] != GPU or row["fits"] != "yes":
            continue
        work, seconds = work_of(row), float(row["iteration_s"])

        def milliseconds(step: float, loss: float, work: Work = work) -> float:
            moved = work.elements * (work.step_samples * step + work.loss_samples * loss)
            return 1e3 * moved / DEVICE.gpu.bandwidth

        theirs, ours = milliseconds(step_bytes, loss_bytes), milliseconds(OURS_STEP, OURS_LOSS)
        launches = work.step_calls * step_launches + work.loss_calls * loss_launches
        here = work.step_calls * OURS_LAUNCHES["step"] + work.loss_calls * OURS_LAUNCHES["loss"]
        share = f"{(theirs - ours) / 10 / seconds:.2g}%"
        lines.append((row["model"], row["iteration_s"], f"{theirs:.3g}", f"{ours:.2g}", share, launches, here))
    return tables.between(DOCUMENT, MARKS, tables.markdown(HEAD, lines))


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
