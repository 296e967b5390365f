"""Noise for sampling: a function of (seed, position, token id) alone, computed for any tokens in any order.

A counter-based generator, as Philox and Threefry are, whose counter is the token id and whose key comes from seed and
position; so a sequence draws the same noise whatever else is in its batch and after it was preempted. numpy's and
torch's generators give one stream for each state: no random access by token, and one state for each row of a batch.

Keys: Splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Tokens: Chris
Wellons' 32-bit mixing function "lowbias32" (public domain), with half the key before and half inside it.

Shapes: B rows (sequences), V token ids.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_MIN_UNIFORM = 2.0**-33
_MAX_UNIFORM = 1 - 2.0**-24
"""The largest float32 below 1."""

MAX_GUMBEL = 22.9
MIN_GUMBEL = -2.9
"""Bounds of the noise, from the bounds of the uniform numbers under it."""


def stream_of(seed: int) -> int:
    """The stream (64 bits) of a seed of any size and sign; neighbouring seeds get unrelated streams."""
    z = (seed + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def keys_of(streams_B: NDArray[np.uint64], positions_B: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The key of each pair of stream and position, (2, B)."""
    z = streams_B + (positions_B + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.stack([z >> np.uint64(32), z & np.uint64(0xFFFFFFFF)]).astype(np.uint32)


def random_bits(token_ids: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """32 random bits for each token id.

    Args:
        token_ids: any shape.
        keys: (2, …), each half of a shape that broadcasts with `token_ids`.
    """
    bits: NDArray[np.uint32] = token_ids ^ keys[0]
    shifted = bits >> 16
    bits ^= shifted
    bits *= np.uint32(_MULTIPLIER_1)
    bits += keys[1]
    np.right_shift(bits, 15, out=shifted)
    bits ^= shifted
    bits *= np.uint32(_MULTIPLIER_2)
    np.right_shift(bits, 16, out=shifted)
    bits ^= shifted
    return bits


def random_bits_on_device(token_ids_V: Tensor, keys_2B: NDArray[np.uint32]) -> Tensor:
    """`random_bits` of every pair of row and token, (B, V) int32, on the device of `token_ids_V` (int32)."""
    keys = torch.from_numpy(keys_2B.view(np.int32)).to(token_ids_V.device).unsqueeze(-1)
    bits = token_ids_V ^ keys[0]
    bits ^= (bits >> 16) & 0xFFFF  # int32 shifts copy the sign: the mask makes them unsigned
    bits *= _MULTIPLIER_1
    bits += keys[1]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _MULTIPLIER_2 - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def negative_gumbel(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard Gumbel noise from random bits, with its sign turned: log(-log(1 - u))."""
    # torch's logarithms are vectorised on every CPU, numpy's are not.
    noise: NDArray[np.float32] = _negative_gumbel_of(torch.from_numpy(bits.astype(np.float32))).numpy()
    return noise


def negative_gumbel_on_device(bits: Tensor) -> Tensor:
    """`negative_gumbel` of int32 bits."""
    return _negative_gumbel_of(bits.float().add_((bits < 0) * 2.0**32))


def _negative_gumbel_of(bits: Tensor) -> Tensor:
    """In place."""
    return bits.mul_(-(2.0**-32)).clamp_(-_MAX_UNIFORM, -_MIN_UNIFORM).log1p_().neg_().log_()
