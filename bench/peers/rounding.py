"""Weights in blocks of one scale, for the peers whose own tools quantize no graph made by hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantize_blocks(
    weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Symmetric, offset to be unsigned: ``weight ~ (q - 2^(bits - 1)) * scale``.

    The value of largest magnitude of a block becomes the lowest code, so that all codes are used.

    Args:
        weight: ``[N, K]``; a last block that is not full is filled with zeros.

    Returns:
        ``q [N, blocks, block]``, one code a byte, and ``scale [N, blocks]``.
    """
    n, k = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -k % block))).reshape(n, -1, block)
    middle = 2 ** (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    scale = largest / np.float32(-middle)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.clip(np.rint(blocks * inverse) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return q, scale[..., 0]


def pack_nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes below 16 to a byte along the last axis, the first in the low half."""
    return q[..., 0::2] | q[..., 1::2] << 4
