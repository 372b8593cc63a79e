"""How weights are rounded to bfloat16 and int8: the definition the C++ core is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


def quantize_rows(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """Symmetric int8, one scale per output row: ``weight[n, k] ~ q[n, k] * scale[n]``.

    ``scale = max|row| / 127`` in float32 and ``q = rint(row / scale)``, ties to even, from -127 to
    127, so ``|weight - q * scale| <= scale / 2`` up to one rounding of float32. A row whose scale
    would be zero or subnormal becomes a row of zeros with scale 0.

    Args:
        weight: ``[N, K]`` float32, finite.

    Returns:
        ``q [N, K]`` int8, ``scale [N]`` float32 and ``colsum [N]`` int32, the sum of q over k (what
        a kernel with unsigned activations subtracts, times the zero point).
    """
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    scale[scale < _SMALLEST_SCALE] = 0
    quotient = weight / np.where(scale > 0, scale, np.float32(np.inf))[:, None]
    q = np.rint(quotient, out=quotient).astype(np.int8)
    return q, scale, q.sum(axis=1, dtype=np.int32)


def dequantize_rows(q: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """``q [N, K]`` times ``scale [N]``, float32."""
    return q.astype(np.float32) * scale[:, None]


def round_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even, same shape.

    Raises:
        OverflowError: a finite value is nearer to infinity than to the largest bfloat16, 3.39e38.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    if np.any((rounded & 0x7FFF) >= 0x7F80):
        raise OverflowError("a value does not fit into bfloat16, whose largest is 3.39e38")
    return rounded


def expand_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits, same shape, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
