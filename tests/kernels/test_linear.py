"""The packed matmul of every precision against float64, and against itself on every ISA."""

import numpy as np
import pytest
from kernel_samples import ISAS, PRECISIONS, inputs, matrix, rounded_activations

import oracle

# Bytes cannot say which way a tie of two neighbours was rounded; a step of the activations can.
STEPS = {"float32": 0.0, "bfloat16": 0.0, "int8": 1 / 32767, "int8-fast": 1 / 255}


def scale_of(act, weight):
    """How large the sums of a row could become, [M, N]."""
    return np.abs(act) @ np.abs(weight).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 3, 16, 17, 64, 97])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 131])
def test_every_shape_equals_the_definition(isa, precision, n, k):
    for rows in (1, 2, 5, 6, 7, 13):
        act, weight, bias = inputs(rows, n, k)
        w = matrix(precision, weight)
        exact = oracle.linear(rounded_activations(precision, act), w.values.astype(float), bias)
        error = np.abs(w.linear(isa, act, bias) - exact)
        # A rounding that falls the other way moves one product by one step.
        step = STEPS[precision] * np.abs(act).max() * np.abs(w.values).max() * 2
        assert (error <= 3e-7 * (scale_of(act, w.values) + np.abs(bias) + 1) + step).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [511, 512, 513, 768, 1600, 3072])
def test_long_sums_equal_the_definition(isa, precision, k):
    act, weight, bias = inputs(3, 20, k, seed=k)
    w = matrix(precision, weight)
    exact = oracle.linear(rounded_activations(precision, act), w.values.astype(float), bias)
    error = np.abs(w.linear(isa, act, bias) - exact)
    step = STEPS[precision] * np.abs(act).max() * np.abs(w.values).max() * 2
    assert (error <= 2e-7 * scale_of(act, w.values) + step).all()


@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["none", "gelu_new", "gelu", "relu"])
def test_every_isa_gives_the_same_bits(isa, precision, activation):
    for rows, n, k in [(1, 96, 50), (6, 64, 33), (13, 81, 128), (4, 48, 1100)]:
        act, weight, bias = inputs(rows, n, k)
        w = matrix(precision, weight)
        ours = w.linear(isa, act, bias, activation=activation)
        assert np.array_equal(ours, w.linear("scalar", act, bias, activation=activation))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_among_any_number_of_rows(isa, precision):
    act, weight, bias = inputs(29, 81, 777)
    w = matrix(precision, weight)
    together = w.linear(isa, act, bias, activation="gelu_new")
    for rows in (1, 2, 3, 6, 8, 11, 12):
        for first in range(0, 29 - rows, 5):
            some = w.linear(isa, act[first : first + rows], bias, activation="gelu_new")
            assert np.array_equal(together[first : first + rows], some)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["int8", "int8-fast"])
def test_the_largest_integers_do_not_overflow(isa, precision):
    k = 6400
    act = np.full((2, k), 3.0, np.float32)
    act[1, ::2] = -3.0
    weight = np.full((16, k), 0.5, np.float32)
    weight[8:] *= -1
    weight[:, ::2] *= np.where(np.arange(16) % 2, 1, -1)[:, None]
    w = matrix(precision, weight)
    ours = w.linear(isa, act, np.zeros(16, np.float32))
    assert np.allclose(ours, act.astype(float) @ weight.T, rtol=1e-4, atol=40)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_reaches_every_output_of_its_row(isa, precision, value):
    act, weight, bias = inputs(3, 20, 40)
    act[1, 7] = value
    ours = matrix(precision, weight).linear(isa, act, bias)
    assert not np.isfinite(ours[1]).any()
    assert np.isfinite(ours[[0, 2]]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_zeros_and_of_subnormal_numbers_give_the_bias(isa, precision):
    _, weight, bias = inputs(1, 20, 40)
    for value in (0.0, 1e-40):
        act = np.full((2, 40), value, np.float32)
        assert np.allclose(matrix(precision, weight).linear(isa, act, bias), bias, atol=1e-35)


@pytest.mark.parametrize("isa", ISAS)
def test_outliers_cost_int8_nothing_and_int8_fast_its_resolution(isa):
    """A few activations 30 times larger than the rest, as in GPT-2's residual stream."""
    act, weight, bias = inputs(16, 64, 768)
    act[:, [7, 138, 378, 447]] *= 30
    exact = oracle.linear(act.astype(float), weight.astype(float), bias)
    norm = np.sqrt((exact**2).mean())

    def error(precision):
        ours = matrix(precision, weight).linear(isa, act, bias)
        return np.sqrt(((ours - exact) ** 2).mean()) / norm

    weights_alone = matrix("int8", weight).values.astype(float)
    rounded = np.sqrt(((oracle.linear(act.astype(float), weights_alone, bias) - exact) ** 2).mean())
    assert error("int8") < 1.001 * rounded / norm
    assert error("int8-fast") < 0.05
    assert error("bfloat16") < 0.005


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_the_epilogue_applies_the_activation(isa, precision, activation):
    act, weight, bias = inputs(7, 40, 24)
    w = matrix(precision, weight)
    plain = w.linear(isa, act, bias)
    ours = w.linear(isa, act, bias, activation=activation)
    expected = oracle.ACTIVATIONS[activation](plain.astype(float))
    assert np.abs(ours - expected).max() < 5e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_residual_is_added(isa, precision):
    act, weight, bias = inputs(7, 40, 24)
    residual = np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32)
    w = matrix(precision, weight)
    ours = w.linear(isa, act, bias, residual=residual)
    assert np.array_equal(ours, residual + w.linear(isa, act, bias))
