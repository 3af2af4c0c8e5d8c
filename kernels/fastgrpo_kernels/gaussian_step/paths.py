"""The two ways to take a Gaussian step: ATen on the CPU, Triton on a device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import elements_of
from .._cpu import add_scaled, column, guide, quotient, sum_blocks
from .._launch import arrivals, coefficient_steps, kernel_scalar, launch, row_strides, rows
from .._noise_args import noise_cpu
from ..noise import split_seed

Coefficient = float | Tensor


class Step(NamedTuple):
    """Tensors and coefficients of one call, checked; ε is `eps`, or that of (`words`, `seed`), or nothing."""

    x: Tensor
    v: Tensor
    a: Coefficient
    b: Coefficient
    s: Coefficient
    eps: Tensor | None
    words: Tensor | None
    seed: int
    out_dtype: torch.dtype
    v_uncond: Tensor | None = None
    guidance: Coefficient | None = None
    clean_a: Coefficient | None = None
    clean_b: Coefficient | None = None
    log_prob: bool = False
    keep_v: bool = False

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Buffers of (y, log-probability, clean sample, guided v), contiguous; empty where not asked for."""
        shape, device, nothing = self.x.shape, self.x.device, (0,)
        return (
            torch.empty(shape, dtype=self.out_dtype, device=device),
            torch.empty(shape[0] if self.log_prob else 0, dtype=torch.float32, device=device),
            torch.empty(nothing if self.clean_a is None else shape, dtype=self.out_dtype, device=device),
            torch.empty(shape if self.keep_v else nothing, dtype=self.v.dtype, device=device),
        )


def gaussian_step_cpu(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ATen path: one buffer, one pass for each term."""
    x, s = step.x.to(torch.float32), step.s
    guidance = step.v_uncond is not None and step.guidance is not None
    v = guide(step.v, step.v_uncond, step.guidance) if guidance else step.v  # pyright: ignore[reportArgumentType]
    _, log_prob, clean, used = step.outputs()
    if step.keep_v:
        used.copy_(v)
    if step.clean_a is not None and step.clean_b is not None:
        clean.copy_(_affine(x, v, step.clean_a, step.clean_b))
    y = _affine(x, v, step.a, step.b)
    mean = y.clone() if step.log_prob else y
    if step.eps is not None or step.words is not None:
        add_scaled(y, s, noise_cpu(step.eps, step.words, step.seed, step.x))
    y = y.to(step.out_dtype)
    if step.log_prob:
        z = mean.sub_(y).mul_(column(quotient(1.0, s), y)).flatten(1)
        log_s = s.double().log() if isinstance(s, Tensor) else math.log(s)
        log_prob.copy_(-0.5 * sum_blocks(z.square_()) / z.shape[1] - log_s - 0.5 * math.log(2.0 * math.pi))
    return y, log_prob, clean, used


def _affine(x: Tensor, v: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(x, column(a, x), out=out)
    add_scaled(out, b, v.to(torch.float32))
    return out


def launch_gaussian_step(step: Step, *, kept: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton path: one launch."""
    from ..noise_kernel import BLOCK, NUM_WARPS, READ_REGISTERS, READ_WARPS
    from .kernel import _gaussian_step_kernel

    y, log_prob, clean, used = step.outputs()
    batch, elements = step.x.shape[0], elements_of(step.x)
    blocks = -(-elements // BLOCK)
    flat = [None if t is None else rows(t) for t in (step.x, step.v, step.v_uncond, step.eps)]
    words = None if step.words is None else step.words.contiguous()
    optional = (step.guidance, step.clean_a, step.clean_b)
    coefficients = [kernel_scalar(0.0 if c is None else c) for c in (step.a, step.b, step.s, *optional)]
    limit = {"maxnreg": READ_REGISTERS} if words is None and step.v_uncond is not None else {}
    density: list[Tensor | None] = [None, None, None]
    if step.log_prob:
        partials = torch.empty((batch, blocks), dtype=torch.float32, device=y.device)
        density = [log_prob, partials, arrivals(batch, y.device, kept=kept)]
    launch(
        _gaussian_step_kernel,
        batch * blocks,
        y.device,
        *(y, *density, None if step.clean_a is None else clean, used if step.keep_v else None),
        *(*flat, words, *split_seed(step.seed), *coefficients),
        *row_strides(flat, elements),
        elements,
        blocks,
        **coefficient_steps(("a", "b", "s", "g", "clean_a", "clean_b"), coefficients),
        BLOCK=BLOCK,
        num_warps=READ_WARPS if words is None else NUM_WARPS,
        **limit,
    )
    return y, log_prob, clean, used
