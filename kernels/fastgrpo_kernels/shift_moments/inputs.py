"""Checked arguments of the shift moments, and how each of the two paths prepares them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    as_rows,
    check_guidance,
    check_latents,
    check_no_grad,
    check_number,
    elements_of,
    per_sample,
    replaced,
)
from .._cpu import Tile, add_scaled, column, difference, guide, quotient, residual, tile_coefficient, tiles
from .._launch import coefficient_steps, kernel_scalar, row_strides, rows
from .._noise_args import MatchingTarget, Noise, StoredStep, check_less_one, noise_cpu, split_noise
from ..noise import split_seed

Coefficient = float | Tensor

LATENTS = ("v", "v_old", "v_uncond", "v_reference", "eps", "x", "y", "x0")
COEFFICIENTS = ("a_less_one", "b", "s", "guidance", "noise_scale", "x0_scale")


class Shift(NamedTuple):
    """Tensors and coefficients of one call; ε is `eps`, or that of (`words`, `seed`), or of (`x`, `y`, a - 1).

    With `x0` the residual v_old - (noise_scale·ε + x0_scale·x0) takes the place of ε. `residuals` is the factor of the
    change in the two mean absolute residuals, None without them. Element j of a sample counts if `mask` [B, M] has True
    at [j // inner % M].
    """

    v: Tensor
    v_old: Tensor
    b: Coefficient
    s: Coefficient
    eps: Tensor | None = None
    words: Tensor | None = None
    seed: int = 0
    x: Tensor | None = None
    y: Tensor | None = None
    a_less_one: Coefficient | None = None
    v_uncond: Tensor | None = None
    guidance: Coefficient | None = None
    v_reference: Tensor | None = None
    mask: Tensor | None = None
    inner: int = 1
    x0: Tensor | None = None
    noise_scale: Coefficient | None = None
    x0_scale: Coefficient | None = None
    residuals: float | None = None

    # A method: torch 2.8's compiler does not follow a property of a named tuple.
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Latents and key, whose kind decides which path runs."""
        return *(getattr(self, name) for name in LATENTS), self.words, self.mask


def check_shift(
    v: Tensor,
    v_old: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise | StoredStep | MatchingTarget,
    v_uncond: Tensor | None,
    guidance_scale: Coefficient | None,
    v_reference: Tensor | None = None,
    mask: Tensor | None = None,
    residuals: float | None = None,
) -> Shift:
    """The arguments of a call, or one line that names the one that is wrong."""
    check_latents("v", v)
    check_latents("v_old", v_old, like=v)
    if v_reference is not None:
        check_latents("v_reference", v_reference, like=v)
    b, s = per_sample("b", b, v), per_sample("s", s, v, positive=True)
    check_no_grad(v_old=v_old, b=b, s=s, v_reference=v_reference)
    guidance = check_guidance(v, v_uncond, guidance_scale)
    chosen, inner = (None, 1) if mask is None else check_mask(mask, v)
    if residuals is not None:
        residuals = check_number("residuals", residuals)
        if not -math.inf < residuals < math.inf:
            raise ValueError(f"residuals: must be finite, got {residuals}")
        if not isinstance(noise, MatchingTarget):
            raise TypeError(f"residuals: are those of a MatchingTarget, got {type(noise).__name__} for noise")
    if isinstance(noise, StoredStep):
        check_latents("noise.x", noise.x, like=v)
        check_latents("noise.y", noise.y, like=v)
        less_one = check_less_one("noise.", noise.a, noise.a_less_one, v)
        check_no_grad(**{"noise.x": noise.x, "noise.y": noise.y})
        stored = noise.x, noise.y, less_one
        return Shift(v, v_old, b, s, None, None, 0, *stored, v_uncond, guidance, v_reference, chosen, inner)
    target: tuple = ()
    if isinstance(noise, MatchingTarget):
        check_latents("noise.x0", noise.x0, like=v)
        scales = [per_sample(f"noise.{name}", getattr(noise, name), v) for name in ("noise_scale", "x0_scale")]
        check_no_grad(**{"noise.x0": noise.x0, "noise.noise_scale": scales[0], "noise.x0_scale": scales[1]})
        target = noise.x0, *scales, residuals
        noise = noise.key
    if noise is None:
        raise TypeError("noise: expected the step's NoiseKey, its noise tensor or its StoredStep, got None")
    eps, words, seed = split_noise(noise, v)
    stored = None, None, None
    return Shift(v, v_old, b, s, eps, words, seed, *stored, v_uncond, guidance, v_reference, chosen, inner, *target)


def check_mask(mask: object, like: Tensor) -> tuple[Tensor, int]:
    """(mask [B, M], inner): element j of a sample counts if its mask has True at [j // inner % M].

    A mask of the latents' leading dimensions, such as [B, tokens] of packed latents, or one that broadcasts with them,
    is not expanded where the dimensions that it varies in stand together.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, True where an element counts, got {found}")
    shape = like.shape
    sizes = [*mask.shape, *[1] * (like.ndim - mask.ndim)]
    if len(sizes) != like.ndim or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"mask: expected the latents' shape {list(shape)}, its first dimensions, or 1 where they share it, got "
            f"{list(mask.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"mask: is on {mask.device}, the latents on {like.device}; move it there")
    varies = [i for i in range(1, like.ndim) if sizes[i] != 1]
    first, last = (varies[0], varies[-1] + 1) if varies else (1, 1)
    whole = [sizes[0], *[1] * (first - 1), *shape[first:last], *[1] * (like.ndim - last)]
    flat = mask.view(sizes).expand(whole).reshape(sizes[0], -1)
    return flat.expand(shape[0], -1), math.prod(shape[last:])


def masked(shift: Shift) -> Tensor | None:
    """The mask of every element, bool [B, D]."""
    if shift.mask is None:
        return None
    batch, length = shift.mask.shape
    outer = elements_of(shift.v) // (length * shift.inner)
    return shift.mask.view(batch, 1, length, 1).expand(batch, outer, length, shift.inner).reshape(batch, -1)


def with_rows(shift: Shift) -> Shift:
    """Coefficients as [B] tensors, for the custom operators."""
    names = [n for n in COEFFICIENTS if getattr(shift, n) is not None]
    values = as_rows([getattr(shift, n) for n in names], shift.v)
    return replaced(shift, **dict(zip(names, values, strict=True)))


def with_noise(shift: Shift) -> Shift:
    """The same with a key's ε as a float32 tensor, which the CPU keeps: making it again costs more than reading it."""
    if shift.words is None:
        return shift
    return shift._replace(eps=noise_cpu(None, shift.words, shift.seed, shift.v), words=None)


def shift_tiles(shift: Shift) -> Iterator[tuple[Tile | None, Shift]]:
    """(tile, its part of the call as [rows, columns]) of every tile; a key's noise is made first."""
    shift = with_noise(shift)
    flat = {name: rows(t) for name in LATENTS if (t := getattr(shift, name)) is not None}
    if (mask := masked(shift)) is not None:
        flat["mask"] = mask
    batch, elements = flat["v"].shape
    for tile in tiles(batch, elements):
        if tile is None:
            yield None, shift._replace(**flat)
            continue
        parts: dict[str, object] = {name: t[tile] for name, t in flat.items()}
        for name in COEFFICIENTS:
            parts[name] = tile_coefficient(getattr(shift, name), tile)
        yield tile, shift._replace(**parts)


def noise_of(part: Shift) -> Tensor:
    """ε of a tile in float32: as kept, or of the stored step; against a target the old output's residual."""
    if part.x0 is not None:
        assert part.eps is not None
        assert part.noise_scale is not None
        assert part.x0_scale is not None
        target = part.eps.to(torch.float32) * column(part.noise_scale, part.v)
        add_scaled(target, part.x0_scale, part.x0.to(torch.float32))
        return difference(part.v_old, target)
    if part.eps is not None:
        return part.eps.to(torch.float32)
    assert part.x is not None
    assert part.y is not None
    assert part.a_less_one is not None
    scaled = residual(part.y, part.x, part.v_old, part.a_less_one, part.b)
    return scaled.mul_(column(quotient(1.0, part.s), part.v))


def guided(shift: Shift) -> Tensor:
    """The model output that the step used."""
    if shift.v_uncond is None or shift.guidance is None:
        return shift.v
    return guide(shift.v, shift.v_uncond, shift.guidance)


def kernel_arguments(shift: Shift) -> tuple[list[object], dict[str, object], int]:
    """Arguments of both latent-sized kernels after their outputs, their constants, and the number of programs."""
    from ..noise_kernel import BLOCK, READ_REGISTERS

    flat = [None if t is None else rows(t) for t in (getattr(shift, name) for name in LATENTS)]
    words = None if shift.words is None else shift.words.contiguous()
    mask, layout = None, (None, None, None)
    if shift.mask is not None:
        mask = shift.mask if shift.mask.stride(1) == 1 or shift.mask.shape[1] == 1 else shift.mask.contiguous()
        layout = mask.stride(0), shift.inner, mask.shape[1]
        mask = mask.view(torch.uint8)
    values = zip(COEFFICIENTS, (0.0, 0.0, 0.0, 1.0, 0.0, 0.0), strict=True)
    coefficients = [kernel_scalar(absent if (c := getattr(shift, name)) is None else c) for name, absent in values]
    batch, elements = shift.v.shape[0], elements_of(shift.v)
    blocks = -(-elements // BLOCK)
    constants: dict[str, object] = {**coefficient_steps("absgnc", coefficients)}
    constants |= {"BLOCK": BLOCK, "num_warps": _warps(shift)}
    if shift.x is not None or (shift.x0 is not None and shift.words is None):
        constants["maxnreg"] = READ_REGISTERS
    arguments = [*flat, mask, words, *split_seed(shift.seed), *coefficients, shift.residuals]
    arguments += [*row_strides(flat, elements), *layout, elements, blocks]
    return arguments, constants, batch * blocks


def _warps(shift: Shift) -> int:
    """Warps to a block: fewer elements a thread where more latents are in flight, so that registers stay few."""
    from ..noise_kernel import NUM_WARPS, READ_WARPS

    besides = [shift.v_uncond, shift.v_reference, shift.x0]
    extra = sum(t is not None for t in besides)
    if shift.words is not None and extra == 0 and shift.mask is None:
        return NUM_WARPS
    many = shift.x is not None or (extra > 1 and (shift.words is None or shift.x0 is not None))
    # Four elements are a 128-bit load of float32.
    return 2 * READ_WARPS if many and shift.v.dtype == torch.float32 else READ_WARPS


def empty_gradients(shift: Shift) -> tuple[Tensor, Tensor]:
    """Contiguous buffers for the gradients of v and v_uncond; the latter is empty without guidance."""
    v = shift.v
    shape = v.shape if shift.v_uncond is not None else (0,)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty(shape, dtype=v.dtype, device=v.device)
