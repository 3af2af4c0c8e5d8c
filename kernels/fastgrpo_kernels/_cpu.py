"""What the ATen paths share: coefficients as columns, fused multiply-adds, a reduction with fixed order, and tiles.

Latents are taken in tiles that stay in cache, so that temporaries cost neither memory nor bandwidth.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements to a partial sum; below ATen's parallel grain, so that bits depend on neither batch nor threads.
_BLOCK = 4096
# Elements to a tile.
_TILE = 1 << 17

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
    out = torch.empty(left.shape, dtype=torch.float32)
    if left.dtype == right.dtype == torch.float32:
        return torch.sub(left, right, out=out)
    return out.copy_(left).sub_(right)


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


def tiles(batch: int, elements: int) -> Iterator[Tile]:
    """(rows, columns) that cover [B, D], whole blocks wide but for the last."""
    columns = max(_TILE // batch // _BLOCK, 1) * _BLOCK
    height = max(_TILE // min(columns, elements), 1)
    for row in range(0, batch, height):
        for column in range(0, elements, columns):
            yield slice(row, row + height), slice(column, min(column + columns, elements))


def tile_coefficient(coefficient: float | Tensor, tile: Tile) -> float | Tensor:
    """A coefficient of a tile's rows."""
    return coefficient[tile[0]] if isinstance(coefficient, Tensor) else coefficient


class BlockSums:
    """Sums over dim 1 of [B, D] from its tiles: partial sums of fixed blocks, so that a row's bits are its own."""

    def __init__(self, batch: int, elements: int) -> None:
        self.whole = elements // _BLOCK
        self.partials = torch.empty((batch, -(-elements // _BLOCK)), dtype=torch.float32)

    def add(self, tile: Tile, values: Tensor) -> None:
        """Take in the values of one tile."""
        rows, columns = tile
        first, whole = columns.start // _BLOCK, values.shape[1] // _BLOCK
        if whole:
            blocks = values[:, : whole * _BLOCK].unflatten(1, (-1, _BLOCK))
            self.partials[rows, first : first + whole] = blocks.sum(2)
        if values.shape[1] % _BLOCK:
            self.partials[rows, first + whole] = values[:, whole * _BLOCK :].sum(1)

    def total(self) -> Tensor:
        """The sums, float64 [B]."""
        total = self.partials[:, self.whole :].sum(1).double()
        if self.whole:
            total += self.partials[:, : self.whole].sum(1, dtype=torch.float64)
        return total


def sum_blocks(values: Tensor) -> Tensor:
    """Sum over dim 1 of [B, D], float64 [B], in the order of `BlockSums`."""
    sums = BlockSums(*values.shape)
    sums.add((slice(0, values.shape[0]), slice(0, values.shape[1])), values)
    return sums.total()


def guide(v: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v_uncond + scale·(v - v_uncond) in float32, rounded to v's dtype."""
    out = difference(v, v_uncond).mul_(column(scale, v))
    return out.add_(v_uncond).to(v.dtype)
