"""numpy oracle of NOISE_V1: exact integer words, float64 Box-Muller on the float32 uniforms."""

import numpy as np


def philox_words(words: np.ndarray, seed: int, groups: int) -> np.ndarray:
    """Output words, uint32 [B, groups, 4], of key words [B, 3]."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    row = words.astype(np.int64).astype(np.uint64) & mask
    counter = np.arange(groups, dtype=np.uint64) & mask
    first = row[:, 0:1] & np.uint64(0x7FFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(counter[None, :], first, row[:, 1:2], row[:, 2:3])
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & mask, (a >> shift) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normal(words: np.ndarray, seed: int, elements: int) -> np.ndarray:
    """ε as float64 [B, elements]."""
    w = philox_words(words, seed, (elements + 3) // 4)
    u = w[..., 0::2].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    angle = w[..., 1::2].astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    mirrored = np.where(words[:, :1] < 0, -1.0, 1.0)
    return mirrored * pairs.reshape(len(words), -1)[:, :elements]
