"""Triton form of NOISE_V1: Philox words, Box-Muller in registers, and a kernel that writes ε."""

import triton
import triton.language as tl

# Constants of the numerics: reductions over a block depend on them. Never tuned at run time.
BLOCK = 2048
NUM_WARPS = 4
# Of kernels that read all they need: 8 elements a thread, one 128-bit load of bfloat16, and at most 40 registers.
READ_WARPS = 8


@triton.jit
def _cos_sin(word):
    """cos and sin of 2π·word·2⁻³²: exact integer reduction to an octant, then minimax polynomials (no slow path)."""
    quadrant = (word + 0x20000000) >> 30
    t = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    t2 = t * t
    sin = t + t * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 + t2 * -1.9515295891e-4))
    cos = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    odd = (quadrant & 1) != 0
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return x, y


@triton.jit
def _radius(word):
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))


@triton.jit
def normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK: tl.constexpr):
    """ε of elements [block·BLOCK, (block + 1)·BLOCK) of a row, float32 [BLOCK]."""
    w0 = tl.load(words_ptr + row * 3).to(tl.uint32, bitcast=True)
    w1 = tl.load(words_ptr + row * 3 + 1).to(tl.uint32, bitcast=True)
    w2 = tl.load(words_ptr + row * 3 + 2).to(tl.uint32, bitcast=True)
    c0 = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = c0 * 0
    k0 = tl.cast(seed_low, tl.int32).to(tl.uint32, bitcast=True)
    k1 = tl.cast(seed_high, tl.int32).to(tl.uint32, bitcast=True)
    # The stub types the jitted function as NoReturn.
    r0, r1, r2, r3 = tl.random.philox_impl(c0, zero + w0, zero + w1, zero + w2, k0, k1)  # pyright: ignore
    radius_a, radius_b = _radius(r0), _radius(r2)
    cos_a, sin_a = _cos_sin(r1)
    cos_b, sin_b = _cos_sin(r3)
    even = tl.interleave(radius_a * cos_a, radius_b * cos_b)
    odd = tl.interleave(radius_a * sin_a, radius_b * sin_b)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _normal_kernel(out_ptr, words_ptr, seed_low, seed_high, elements, blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    noise = normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    tl.store(out_ptr + row * elements + start + offsets, noise, mask=offsets < elements - start)
