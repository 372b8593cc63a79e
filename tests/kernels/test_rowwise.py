"""Layer norm, activations, exp and its sum against float64."""

import numpy as np
import pytest

import oracle
from gptx import _core
from gptx.packing import pad_end, padded

ISAS = _core.usable_isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 48, 257, 768])
def test_layer_norm_equals_the_definition(isa, n):
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((3, n)) * 5 + 2).astype(np.float32)
    gain, bias = rng.standard_normal((2, n)).astype(np.float32)
    ours = _core.testing.layer_norm(
        isa, x, pad_end(gain, padded(n)), pad_end(bias, padded(n)), 1e-5
    )
    exact = oracle.layer_norm(x.astype(float), gain, bias, 1e-5)
    # A row of one or two values may cancel to nothing: only epsilon keeps it finite.
    assert np.abs(ours - exact).max() < (1e-5 if n > 2 else 1e-3)
    reference = _core.testing.layer_norm(
        "scalar", x, pad_end(gain, padded(n)), pad_end(bias, padded(n)), 1e-5
    )
    assert np.array_equal(ours, reference)


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_within_two_units_in_the_last_place(isa):
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    exact = np.exp(x.astype(float))
    ours = _core.testing.exp(isa, x)
    assert (np.abs(ours - exact) / exact).max() < 2.4e-7
    assert np.array_equal(ours, _core.testing.exp("scalar", x))


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_clamped_and_never_infinite(isa):
    extremes = np.array([-np.inf, -1e30, -100, 100, 1e30, np.inf], np.float32)
    ours = _core.testing.exp(isa, extremes)
    assert np.isfinite(ours).all()
    assert (ours[:3] < 2e-38).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 127, 128, 129, 1000, 50257])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 20.0])
def test_the_sum_of_exp_is_as_exact_as_its_terms(isa, n, spread):
    x = (np.random.default_rng(n).standard_normal(n) * spread - 40).astype(np.float32)
    exact = np.exp(x.astype(float) - float(x.max())).sum()
    ours = _core.testing.sum_exp(isa, x, x.max())
    assert abs(ours - exact) < 2e-7 * exact
    assert ours == _core.testing.sum_exp("scalar", x, x.max())


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_far_below_the_shift_adds_next_to_nothing_to_the_sum_of_exp(isa):
    x = np.array([3, -85, -1e30, -3e38], np.float32)
    assert _core.testing.sum_exp(isa, x, 3.0) == 1
    assert 0 < _core.testing.sum_exp(isa, x[2:], 3.0) < 4e-38


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_activations_are_as_exact_as_float32_allows(isa, activation):
    x = np.linspace(-12, 12, 100_001).astype(np.float32)
    exact = oracle.ACTIVATIONS[activation](x.astype(float))
    ours = _core.testing.activate(isa, x, activation)
    assert np.abs(ours - exact).max() < 1e-6
    assert np.array_equal(ours, _core.testing.activate("scalar", x, activation))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_activations_keep_nan_and_handle_huge_values(isa, activation):
    x = np.array([np.nan, 1e30, -1e30, 0.0], np.float32)
    ours = _core.testing.activate(isa, x, activation)
    assert np.isnan(ours[0])
    assert ours[1] == np.float32(1e30)
    assert abs(ours[2]) < 1e-6
    assert ours[3] == 0
