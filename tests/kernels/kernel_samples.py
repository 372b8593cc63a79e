"""Matrices as each precision stores them, and the exact arithmetic of each precision in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptx import _core
from gptx.packing import pack_panels, pad_end, padded
from gptx.quantize import dequantize_rows, expand_bfloat16, quantize_rows, round_bfloat16

ISAS = _core.usable_isas()
PRECISIONS = ["float32", "bfloat16", "int8", "int8-fast"]


@dataclass
class Matrix:
    """A weight [N, K] in one precision: what is computed with, and how it is packed."""

    precision: str
    values: np.ndarray  # [N, K] float32, after rounding
    packed: np.ndarray
    scale: np.ndarray  # [N] padded
    colsum: np.ndarray  # [N] padded

    def linear(self, isa, act, bias, **options):
        n = len(self.values)
        residual = options.pop("residual", None)
        if residual is not None:
            residual = pad_end(residual, padded(n), axis=1)
        return _core.testing.linear(
            isa,
            self.precision,
            act,
            self.packed,
            self.scale,
            self.colsum,
            pad_end(bias, padded(n)),
            residual=residual,
            **options,
        )[:, :n]


def matrix(precision, weight):
    n = padded(len(weight))
    none = np.zeros(n, np.float32), np.zeros(n, np.int32)
    if precision == "float32":
        return Matrix(precision, weight, pack_panels(weight), *none)
    if precision == "bfloat16":
        bits = round_bfloat16(weight)
        return Matrix(precision, expand_bfloat16(bits), pack_panels(bits, 2), *none)
    q, scale, colsum = quantize_rows(weight)
    values = dequantize_rows(q, scale)
    return Matrix(precision, values, pack_panels(q, 4), pad_end(scale, n), pad_end(colsum, n))


def rounded_activations(precision, act):
    """What the activations [M, K] become in a precision, as float64."""
    if precision == "float32":
        return act.astype(float)
    if precision == "bfloat16":
        return expand_bfloat16(round_bfloat16(act)).astype(float)
    if precision == "int8":
        scale = np.abs(act).max(axis=1, keepdims=True).astype(float) / 32767
        return np.rint(act / np.where(scale > 0, scale, 1)) * scale
    low = np.minimum(act.min(axis=1, keepdims=True), 0).astype(float)
    scale = (np.maximum(act.max(axis=1, keepdims=True), 0) - low) / 255
    return np.rint(act / np.where(scale > 0, scale, 1)) * scale


def inputs(rows, n, k, seed=0):
    rng = np.random.default_rng(seed)
    act = rng.standard_normal((rows, k)).astype(np.float32)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    return act, weight, bias
