"""Sums of a row over the programs that share it, in one launch and in fixed order.

Every program stores its partial sums in slots of its own and then counts itself in; the last to arrive adds a row's
slots, always in the same order, so that bits do not depend on which program that was.
"""

import triton
import triton.language as tl

# A constant of the numerics.
TILE = tl.constexpr(256)


@triton.jit
def is_last_of_row(arrivals_ptr, row, blocks):
    """Whether every other program of the row has stored its partial sums; sets the row's counter back to zero."""
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals_ptr + row, 1) == blocks - 1
    if is_last:
        tl.store(arrivals_ptr + row, 0)
    return is_last


@triton.jit
def sum_slots(partials_ptr, row, blocks):
    """Sum of a row's slots [blocks] of contiguous partials [B, blocks]."""
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, blocks, TILE):
        mask = start + offsets < blocks
        total += tl.load(partials_ptr + row * blocks + start + offsets, mask=mask, other=0.0)
    return tl.sum(total)
