"""The packed matmul against float64, and against itself on every ISA."""

import numpy as np
import pytest

import oracle
from gptx import _core
from gptx.packing import pack_panels, pad_end, padded

ISAS = _core.usable_isas()


def inputs(rows, n, k, seed=0):
    rng = np.random.default_rng(seed)
    act = rng.standard_normal((rows, k)).astype(np.float32)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    return act, weight, bias


def linear(isa, act, weight, bias, **options):
    n = weight.shape[0]
    residual = options.pop("residual", None)
    if residual is not None:
        residual = pad_end(residual, padded(n), axis=1)
    out = _core.testing.linear_f32(
        isa, act, pack_panels(weight), pad_end(bias, padded(n)), residual=residual, **options
    )
    return out[:, :n]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 3, 16, 17, 64, 97])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 131])
def test_every_shape_equals_the_definition(isa, n, k):
    for rows in (1, 2, 5, 6, 7, 13):
        act, weight, bias = inputs(rows, n, k)
        exact = oracle.linear(act.astype(float), weight.astype(float), bias)
        naive = np.abs(act @ weight.T + bias - exact).max()
        error = np.abs(linear(isa, act, weight, bias) - exact).max()
        assert error <= 2 * naive + 1e-6 * np.sqrt(k)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("activation", ["none", "gelu_new", "gelu", "relu"])
def test_every_isa_gives_the_same_bits(isa, activation):
    for rows, n, k in [(1, 96, 50), (6, 64, 33), (13, 81, 128)]:
        act, weight, bias = inputs(rows, n, k)
        ours = linear(isa, act, weight, bias, activation=activation)
        assert np.array_equal(ours, linear(ISAS[0], act, weight, bias, activation=activation))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_among_any_number_of_rows(isa):
    act, weight, bias = inputs(29, 81, 77)
    together = linear(isa, act, weight, bias, activation="gelu_new")
    for row in range(29):
        alone = linear(isa, act[row : row + 1], weight, bias, activation="gelu_new")
        assert np.array_equal(together[row : row + 1], alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_the_epilogue_applies_the_activation(isa, activation):
    act, weight, bias = inputs(7, 40, 24)
    plain = linear(isa, act, weight, bias)
    ours = linear(isa, act, weight, bias, activation=activation)
    expected = oracle.ACTIVATIONS[activation](plain.astype(float))
    assert np.abs(ours - expected).max() < 5e-6


@pytest.mark.parametrize("isa", ISAS)
def test_the_residual_is_added(isa):
    act, weight, bias = inputs(7, 40, 24)
    residual = np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32)
    ours = linear(isa, act, weight, bias, residual=residual)
    assert np.array_equal(ours, residual + linear(isa, act, weight, bias))
