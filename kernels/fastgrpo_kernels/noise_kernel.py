"""Triton form of NOISE_V1: Philox words, Box-Muller in registers, and a kernel that writes ε."""

import triton
import triton.language as tl

# Constants of the numerics: reductions over a block depend on them. Never tuned at run time.
BLOCK = 2048
NUM_WARPS = 4
# Of kernels that read all they need: 8 elements a thread, one 128-bit load of bfloat16, and at most 40 registers.
READ_WARPS = 8
# Where many latents are read the compiler takes more registers, unasked, than it needs. No part of the numerics.
READ_REGISTERS = 40


@triton.jit
def _cos_sin(word):
    """cos and sin of 2π·word·2⁻³²: exact integer reduction to an octant, then minimax polynomials (no slow path)."""
    # What is left of a quarter turn, in ±1/8 of a turn, is the low 30 bits with a sign.
    t = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295320396492e-10
    t2 = t * t
    sin = t + t * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 + t2 * -1.9515295891e-4))
    cos = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    # The two high bits count quarter turns: the lower one swaps, signs are those of the quadrant.
    quarter = word + 0x20000000
    odd = (quarter & 0x40000000) != 0
    return _negate(tl.where(odd, sin, cos), quarter + 0x40000000), _negate(tl.where(odd, cos, sin), quarter)


@triton.jit
def _negate(value, word):
    """value, negative where the word's highest bit is set."""
    return (value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _radius(word):
    """√(-2·ln u), u = (word + ½)·2⁻³² in (0, 1]: u = m·2ᵉ with m in [2/3, 4/3), and a polynomial in f = m - 1.

    A general logarithm spends a third of its instructions on numbers that u cannot be.
    """
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # (-2·ln(1 + f) + 2f)/f², fitted in relative error of the logarithm: 2.6e-8.
    p = 0.30777132511138916 + f * -0.28052765130996704
    p = -0.27991604804992676 + f * p
    p = 0.32831913232803345 + f * p
    p = -0.40022337436676025 + f * p
    p = 0.5001564025878906 + f * p
    p = -0.6666639447212219 + f * p
    p = 0.9999987483024597 + f * p
    # -2·ln 2·2⁻²³: the exponent stands 23 bits up.
    square = exponent.to(tl.float32) * -1.6525916589735634e-07 + f * -2.0 + (f * f) * p
    return tl.sqrt(tl.maximum(square, 0.0))


@triton.jit
def _wide_multiply(word, factor):
    """High and low half of a 64-bit product: one instruction."""
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10."""
    # Stubs type jitted functions as NoReturn.
    for _ in tl.static_range(10):  # pyright: ignore
        high_a, low_a = _wide_multiply(c0, 0xD2511F53)  # pyright: ignore
        high_b, low_b = _wide_multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


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
    r0, r1, r2, r3 = _philox(c0, zero + (w0 & 0x7FFFFFFF), zero + w1, zero + w2, k0, k1)  # pyright: ignore
    # The first word's highest bit mirrors.
    radius_a, radius_b = _negate(_radius(r0), w0), _negate(_radius(r2), w0)
    cos_a, sin_a = _cos_sin(r1)
    cos_b, sin_b = _cos_sin(r3)
    even = tl.interleave(radius_a * cos_a, radius_b * cos_b)
    odd = tl.interleave(radius_a * sin_a, radius_b * sin_b)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "blocks"])
def _normal_kernel(out_ptr, words_ptr, seed_low, seed_high, elements, blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    block = pid % blocks
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    noise = normal_block(words_ptr, row, block, seed_low, seed_high, BLOCK)
    tl.store(out_ptr + row * elements + start + offsets, noise, mask=offsets < elements - start)
