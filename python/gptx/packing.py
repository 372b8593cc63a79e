"""The packed layout of weight matrices: the definition the C++ core is tested against.

A matrix ``[N, K]`` (N outputs, K inputs) is cut into panels of 16 outputs. Inside a panel the
inputs advance in groups that fill 4 bytes (1 float32, 2 bfloat16 or 4 int8), so one step over k is
one line of 64 bytes, whatever the type. Rows and groups that are not full are padded with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LANES = 16
"""Outputs in a panel."""


def padded(n: int, multiple: int = LANES) -> int:
    """``n`` rounded up to a multiple."""
    return -(-n // multiple) * multiple


def packed_shape(n: int, k: int, group: int) -> tuple[int, ...]:
    """The shape `pack_panels` gives a matrix ``[n, k]``."""
    panels = (padded(n) // LANES, padded(k, group) // group, LANES)
    return panels if group == 1 else (*panels, group)


def pack_panels(matrix: NDArray, group: int = 1) -> NDArray:
    """Panels of a matrix: ``packed[p, g, j, e] = matrix[16 * p + j, group * g + e]``.

    Args:
        matrix: ``[N, K]`` of any type.
        group: 1 for float32, 2 for bfloat16 (as uint16), 4 for int8.

    Returns:
        Contiguous ``[N / 16, K / group, 16, group]``, without the last axis where group is 1.
    """
    n, k = matrix.shape
    full = pad_end(pad_end(matrix, padded(n), axis=0), padded(k, group), axis=1)
    panels = full.reshape(padded(n) // LANES, LANES, -1, group).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(panels).reshape(packed_shape(n, k, group))


def unpack_panels(packed: NDArray, n: int, k: int) -> NDArray:
    """The matrix ``[n, k]`` that `pack_panels` packed, contiguous."""
    panels = packed.reshape(*packed.shape[:3], -1).transpose(0, 2, 1, 3)
    rows = panels.reshape(panels.shape[0] * LANES, -1)
    return np.ascontiguousarray(rows[:n, :k])


def head_major_rows(n_embd: int, n_head: int) -> int:
    """N of a head-major c_attn: ``n_head * 3 * Dp``, Dp = the head size padded to 16."""
    return n_head * 3 * padded(n_embd // n_head)


def to_head_major(rows: NDArray, n_head: int) -> NDArray:
    """Regroups the rows of c_attn by head, each of q, k and v padded to a multiple of 16 rows.

    Args:
        rows: ``[3C, ...]``: all of q, all of k, all of v (a weight, bias, scale or colsum).
        n_head: H, a divisor of C.

    Returns:
        ``[H * 3 * Dp, ...]``: for each head q, k, v, with D = C / H real rows each, then zeros.
    """
    rest = rows.shape[1:]
    by_head = np.moveaxis(rows.reshape(3, n_head, -1, *rest), 0, 1)
    return pad_end(by_head, padded(by_head.shape[2]), axis=2).reshape(-1, *rest)


def from_head_major(rows: NDArray, n_head: int, n_embd: int) -> NDArray:
    """The rows ``[3C, ...]`` that `to_head_major` regrouped."""
    rest = rows.shape[1:]
    by_head = rows.reshape(n_head, 3, -1, *rest)[:, :, : n_embd // n_head]
    return np.moveaxis(by_head, 1, 0).reshape(-1, *rest)


def pad_end(array: NDArray, length: int, axis: int = 0) -> NDArray:
    """Zeros after the end of one axis; the array itself where nothing is missing."""
    missing = length - array.shape[axis]
    if missing == 0:
        return array
    return np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
