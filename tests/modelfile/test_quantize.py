"""The rounding to int8 and bfloat16: bounds and edges."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.quantize import dequantize_rows, expand_bfloat16, quantize_rows, round_bfloat16

TINY = np.finfo(np.float32).smallest_normal


def _weights(n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(n * 1000 + k)
    rows = rng.standard_normal((n, k)) * 10.0 ** rng.integers(-20, 20, (n, 1))
    return rows.astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (33, 200)])
def test_the_int8_error_is_at_most_half_a_scale(n: int, k: int) -> None:
    weights = _weights(n, k)
    q, scale, _ = quantize_rows(weights)
    error = np.abs(q.astype(np.float64) * scale[:, None].astype(np.float64) - weights)
    assert (error <= scale[:, None].astype(np.float64) * (0.5 + 1e-4)).all()


def test_int8_uses_the_whole_symmetric_range_and_no_more() -> None:
    q, _, _ = quantize_rows(_weights(64, 300))
    assert (np.abs(q.astype(int)).max(axis=1) == 127).all()


def test_the_column_sum_is_the_sum_of_the_row() -> None:
    q, _, colsum = quantize_rows(_weights(9, 1000))
    assert colsum.dtype == np.int32
    np.testing.assert_array_equal(colsum, [sum(map(int, row)) for row in q])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 100 * TINY, -127 * TINY * 0.9])
def test_a_row_too_small_for_a_scale_becomes_zero(value: float) -> None:
    q, scale, colsum = quantize_rows(np.full((1, 8), value, np.float32))
    assert not q.any()
    assert scale[0] == 0
    assert colsum[0] == 0


def test_the_largest_and_the_smallest_scales_work() -> None:
    weights = np.array([[3.4e38, -3.4e38], [127 * TINY, TINY]], np.float32)
    q, scale, _ = quantize_rows(weights)
    np.testing.assert_array_equal(q, [[127, -127], [127, 1]])
    np.testing.assert_allclose(dequantize_rows(q, scale), weights, rtol=1e-5)


def test_quantizing_rows_together_or_alone_is_the_same() -> None:
    weights = _weights(5, 40)
    together = quantize_rows(weights)
    for i in range(5):
        for a, b in zip(together, quantize_rows(weights[i : i + 1]), strict=True):
            np.testing.assert_array_equal(a[i : i + 1], b)


def test_bfloat16_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(round_bfloat16(values), expected.view(np.uint16))


def test_bfloat16_ties_go_to_even_and_exact_values_stay() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F800000, 0x80000000], np.uint32)
    rounded = round_bfloat16(bits.view(np.float32))
    assert [hex(value) for value in rounded] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0x8000"]
    np.testing.assert_array_equal(round_bfloat16(expand_bfloat16(rounded)), rounded)


def test_a_value_that_would_become_infinite_in_bfloat16_is_refused() -> None:
    with pytest.raises(OverflowError, match="bfloat16"):
        round_bfloat16(np.array([1.0, 3.4e38], np.float32))
