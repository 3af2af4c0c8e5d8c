"""What the ATen paths share: coefficients as columns, fused multiply-adds, a reduction with fixed order, and tiles.

Latents are taken in tiles that stay in cache, so that temporaries cost neither memory nor bandwidth.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements to a partial sum; below ATen's parallel grain, so that bits depend on neither batch nor threads.
_BLOCK = 4096
# Elements to a tile.
_TILE = 1 << 18

Tile = tuple[slice, slice]


def column(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """A coefficient that multiplies latents like `like`: a float, or float32 [B, 1, ...]."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    return coefficient.to(torch.float32).view(-1, *[1] * (like.ndim - 1))


def add_scaled(total: Tensor, coefficient: float | Tensor, term: Tensor) -> None:
    """total += coefficient·term, in place."""
    scale = column(coefficient, total)
    if isinstance(scale, Tensor):
        total.addcmul_(term, scale)
    else:
        total.add_(term, alpha=scale)


def difference(left: Tensor, right: Tensor) -> Tensor:
    """left - right as a new contiguous float32 tensor."""
    if left.dtype == right.dtype == torch.float32 and left.is_contiguous():
        return torch.sub(left, right)
    return left.to(torch.float32, copy=True, memory_format=torch.contiguous_format).sub_(right)


def residual(y: Tensor, x: Tensor, v: Tensor, a_less_one: float | Tensor, b: float | Tensor) -> Tensor:
    """y - a·x - b·v as a new contiguous float32 tensor.

    As (y - x) - (a - 1)·x - b·v: steps are short and a is near 1, which float32 knows to 6e-8 only, but a - 1 well.
    """
    out = difference(y, x)
    add_scaled(out, -a_less_one, x.to(torch.float32))
    add_scaled(out, -b, v.to(torch.float32))
    return out


def quotient(numerator: float | Tensor, denominator: float | Tensor) -> float | Tensor:
    """numerator/denominator in float64."""
    numerator = numerator.double() if isinstance(numerator, Tensor) else numerator
    return numerator / (denominator.double() if isinstance(denominator, Tensor) else denominator)


def tiles(batch: int, elements: int) -> Iterator[Tile | None]:
    """(rows, columns) that cover [B, D], each one run of memory: rows, or parts of one row of whole blocks; None where
    one tile is all."""
    if batch * elements <= _TILE:
        yield None
        return
    height, width = max(_TILE // elements, 1), min(elements, _TILE)
    for row in range(0, batch, height):
        for column in range(0, elements, width):
            yield slice(row, row + height), slice(column, column + width)


def tile_coefficient(coefficient: float | Tensor, tile: Tile | None) -> float | Tensor:
    """A coefficient of a tile's rows."""
    return coefficient[tile[0]] if isinstance(coefficient, Tensor) and tile is not None else coefficient


class BlockSums:
    """Several sums over dim 1 of [B, D] from tiles: partial sums of fixed blocks, so that a row's bits are its own."""

    def __init__(self, count: int, batch: int, elements: int) -> None:
        self.shape = count, batch, -(-elements // _BLOCK)
        self.partials: Tensor | None = None
        # Where one tile of one block is all, its sums, which need no place among others.
        self.sums: list[Tensor | None] = [None] * count

    def add(self, index: int, tile: Tile | None, values: Tensor) -> None:
        """Take in the values of one tile (None: of all) for the sum `index`."""
        if tile is None and self.shape[2] == 1:
            self.sums[index] = values.sum(-1)
            return
        if self.partials is None:
            self.partials = torch.empty(self.shape, dtype=torch.float32, device=values.device)
        partials, first = self.partials[index], 0
        if tile is not None:
            partials, first = partials[tile[0]], tile[1].start // _BLOCK
        length = values.shape[1]
        whole = length // _BLOCK
        if whole:
            part = values if length == whole * _BLOCK else values[:, : whole * _BLOCK]
            torch.sum(part.unflatten(1, (whole, _BLOCK)), -1, out=partials[:, first : first + whole])
        if length != whole * _BLOCK:
            torch.sum(values[:, whole * _BLOCK :] if whole else values, -1, out=partials[:, first + whole])

    def total(self) -> Sequence[Tensor]:
        """The sums, float64 [B] each; of one that was not added, no number that means anything."""
        if self.partials is None:
            return [torch.empty(0, device="cpu") if found is None else found.double() for found in self.sums]
        return self.partials.sum(2, dtype=torch.float64).unbind(0)


def sum_blocks(values: Tensor) -> Tensor:
    """Sum over dim 1 of [B, D], float64 [B], in the order of `BlockSums`."""
    sums = BlockSums(1, *values.shape)
    sums.add(0, None, values)
    return sums.total()[0]


def traced_sum(values: Tensor) -> Tensor:
    """Sum over dim 1 of [B, D] for `torch.compile`, float64 [B], in blocks: one long float32 sum loses a digit."""
    if (extra := -values.shape[1] % _BLOCK) and values.shape[1] > _BLOCK:
        values = torch.nn.functional.pad(values, (0, extra))
    blocks = values.unflatten(1, (-1, _BLOCK)) if values.shape[1] > _BLOCK else values.unsqueeze(1)
    return blocks.sum(2).sum(1, dtype=torch.float64)


def guide(v: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v_uncond + scale·(v - v_uncond) in float32, rounded to v's dtype."""
    out = difference(v, v_uncond).mul_(column(scale, v))
    return out.add_(v_uncond).to(v.dtype)
