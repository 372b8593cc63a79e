"""Attention over KV blocks against float64."""

import numpy as np
import pytest

import oracle
from gptx import _core

ISAS = _core.usable_isas()


def inputs(rows, size, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((3, rows, size)) * spread).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 16, 20, 25, 64, 80, 128])
def test_every_length_and_head_size_equals_the_definition(isa, size):
    for rows in (1, 2, 7, 63, 64, 65, 130):
        q, k, v = inputs(rows, size)
        ours = _core.testing.attention_f32(isa, q, k, v, 1 / np.sqrt(size))
        exact = oracle.attention(*(a.astype(float) for a in (q, k, v)), 1 / np.sqrt(size))
        assert np.abs(ours - exact).max() < 2e-6


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_do_not_overflow(isa):
    q, k, v = inputs(100, 32, spread=30.0)
    ours = _core.testing.attention_f32(isa, q, k, v, 1.0)
    exact = oracle.attention(*(a.astype(float) for a in (q, k, v)), 1.0)
    assert np.abs(ours - exact).max() < 3e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_positions_not_yet_written_never_reach_a_result(isa, poison):
    q, k, v = inputs(70, 20)
    clean = _core.testing.attention_f32(isa, q, k, v, 0.3)
    assert np.array_equal(_core.testing.attention_f32(isa, q, k, v, 0.3, poison=poison), clean)


@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_isa_gives_the_same_bits(isa):
    q, k, v = inputs(150, 40)
    ours = _core.testing.attention_f32(isa, q, k, v, 0.2)
    assert np.array_equal(ours, _core.testing.attention_f32(ISAS[0], q, k, v, 0.2))
