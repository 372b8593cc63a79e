"""Attention over KV blocks against float64."""

import numpy as np
import pytest
from kernel_samples import ISAS

import oracle
from gptx import _core
from gptx.quantize import expand_bfloat16, round_bfloat16

KV_TYPES = ["float32", "bfloat16", "int8"]
# The probabilities are rounded too: to bfloat16, or with an int8 cache to 16 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 3e-4}


def inputs(rows, size, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((3, rows, size)) * spread).astype(np.float32)


def as_int8(rows):
    """Rows [T, D] rounded to int8 with one scale each."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(rows / scale) * scale


def exact(kv_type, q, k, v, scale):
    if kv_type == "int8":
        k, v = as_int8(k), as_int8(v)
    if kv_type == "bfloat16":
        scaled = expand_bfloat16(round_bfloat16(q * np.float32(scale)))
        k, v = (expand_bfloat16(round_bfloat16(a)) for a in (k, v))
        return oracle.attention(*(a.astype(float) for a in (scaled, k, v)), 1.0)
    return oracle.attention(*(a.astype(float) for a in (q, k, v)), scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("size", [1, 16, 20, 25, 64, 80, 128])
def test_every_length_and_head_size_equals_the_definition(isa, kv_type, size):
    scale = 1 / np.sqrt(size)
    for rows in (1, 2, 7, 63, 64, 65, 130):
        q, k, v = inputs(rows, size)
        ours = _core.testing.attention(isa, kv_type, q, k, v, scale)
        assert np.abs(ours - exact(kv_type, q, k, v, scale)).max() < TOLERANCE[kv_type]


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_do_not_overflow(isa):
    q, k, v = inputs(100, 32, spread=30.0)
    ours = _core.testing.attention(isa, "float32", q, k, v, 1.0)
    assert np.abs(ours - exact("float32", q, k, v, 1.0)).max() < 3e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("poison", [0xFF, 0x7F])
def test_positions_not_yet_written_never_reach_a_result(isa, kv_type, poison):
    """Bytes of 0xFF are NaN in both types, 0x7F huge or NaN."""
    for size in (20, 25):
        q, k, v = inputs(71, size)
        clean = _core.testing.attention(isa, kv_type, q, k, v, 0.3)
        dirty = _core.testing.attention(isa, kv_type, q, k, v, 0.3, poison=poison)
        assert np.array_equal(dirty, clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_position_that_is_not_finite_leaves_earlier_ones_alone(isa, kv_type):
    q, k, v = inputs(70, 20)
    clean = _core.testing.attention(isa, kv_type, q, k, v, 0.3)
    for position in (9, 10, 67):
        damaged = v.copy()
        damaged[position] = np.nan
        ours = _core.testing.attention(isa, kv_type, q, k, damaged, 0.3)
        assert np.array_equal(ours[:position], clean[:position])
        assert np.isnan(ours[position:]).all()
    damaged = k.copy()
    damaged[9] = np.inf
    ours = _core.testing.attention(isa, kv_type, q, damaged, v, 0.3)
    assert np.array_equal(ours[:9], clean[:9])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("step", [1, 3, 7, 50])
def test_rows_in_any_portions_have_the_same_bits(isa, kv_type, step):
    q, k, v = inputs(150, 25)
    whole = _core.testing.attention(isa, kv_type, q, k, v, 0.2)
    assert np.array_equal(_core.testing.attention(isa, kv_type, q, k, v, 0.2, step=step), whole)


@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_isa_gives_the_same_bits(isa, kv_type):
    q, k, v = inputs(150, 40)
    ours = _core.testing.attention(isa, kv_type, q, k, v, 0.2)
    assert np.array_equal(ours, _core.testing.attention("scalar", kv_type, q, k, v, 0.2))
