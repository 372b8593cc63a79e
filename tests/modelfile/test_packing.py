"""The packed layouts against loops that follow their definition element by element."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.packing import (
    from_head_major,
    head_major_rows,
    pack_panels,
    packed_shape,
    padded,
    to_head_major,
    unpack_panels,
)

SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 48]
TYPES = [(1, np.float32), (2, np.uint16), (4, np.int8)]


def _random(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(1, 100, shape).astype(dtype)


def test_padded_rounds_up() -> None:
    assert [padded(n) for n in (1, 15, 16, 17, 32, 33)] == [16, 16, 16, 32, 32, 48]
    assert [padded(n, 4) for n in (1, 4, 5)] == [4, 4, 8]


@pytest.mark.parametrize(("group", "dtype"), TYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 17])
def test_every_element_is_where_the_definition_says(
    n: int, k: int, group: int, dtype: type
) -> None:
    matrix = _random((n, k), dtype)
    packed = pack_panels(matrix, group)
    assert packed.shape == packed_shape(n, k, group)
    assert packed.dtype == dtype
    assert packed.flags.c_contiguous
    by_group = packed.reshape(*packed.shape[:3], group)
    for p, g, j, e in np.ndindex(by_group.shape):
        row, column = 16 * p + j, group * g + e
        expected = matrix[row, column] if row < n and column < k else 0
        assert by_group[p, g, j, e] == expected


@pytest.mark.parametrize(("group", "dtype"), TYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (17, 5), (50, 33), (64, 64), (3, 100)])
def test_unpacking_gives_the_matrix_back(n: int, k: int, group: int, dtype: type) -> None:
    matrix = _random((n, k), dtype)
    np.testing.assert_array_equal(unpack_panels(pack_panels(matrix, group), n, k), matrix)


def test_a_step_over_k_is_one_line_of_64_bytes_in_every_type() -> None:
    for group, dtype in TYPES:
        packed = pack_panels(_random((40, 9), dtype), group)
        assert packed[0, 0].nbytes == 64


def test_a_transposed_matrix_is_packed_like_its_copy() -> None:
    matrix = _random((7, 20), np.float32)
    np.testing.assert_array_equal(pack_panels(matrix.T), pack_panels(matrix.T.copy()))


@pytest.mark.parametrize(("n_embd", "n_head"), [(64, 1), (60, 3), (25, 25), (32, 2), (128, 2)])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_head_major_rows_are_q_k_v_of_each_head(
    n_embd: int, n_head: int, rest: tuple[int, ...]
) -> None:
    rows = _random((3 * n_embd, *rest), np.float32)
    size = n_embd // n_head
    size_padded = padded(size)
    regrouped = to_head_major(rows, n_head)
    assert regrouped.shape == (head_major_rows(n_embd, n_head), *rest)
    for head in range(n_head):
        for part in range(3):
            begin = (head * 3 + part) * size_padded
            for j in range(size_padded):
                source = rows[part * n_embd + head * size + j] if j < size else np.zeros(rest)
                np.testing.assert_array_equal(regrouped[begin + j], source)
    np.testing.assert_array_equal(from_head_major(regrouped, n_head, n_embd), rows)


def test_a_head_of_20_rows_takes_32() -> None:
    assert head_major_rows(60, 3) == 3 * 3 * 32
