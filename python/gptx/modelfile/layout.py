"""Which tensors a model file holds, in which order, and how a weight becomes one of them.

Canonical tensors are what checkpoints are read into: float32, every matrix ``[out, in]``. Stored
tensors are what the core computes with: packed, padded and rounded to the dtype of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptx import packing, quantize
from gptx.config import GPTConfig
from gptx.packing import LANES, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = ("float32", "bfloat16", "int8")
"""What the matrices of a file may be; everything else is float32 in each of them."""

STORED_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
}
"""Names of the safetensors format, and the numpy type of their views (bfloat16 as its bits)."""

MAX_TENSORS = 65_536

CLASS_HEAD = "score.weight"
"""The classification head, ``[n_labels, C]``; like the positions, its rows are float32."""

_ROWS = ("wpe.weight", CLASS_HEAD)

_MATRIX_TYPE = {"float32": ("F32", 1), "bfloat16": ("BF16", 2), "int8": ("I8", 4)}


class StoredTensor(NamedTuple):
    """A tensor of a file. ``begin`` and ``end`` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def canonical_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor, in the order of the file."""
    c, f = config.n_embd, config.n_inner
    block = {
        "ln_1.weight": (c,),
        "ln_1.bias": (c,),
        "attn.c_attn.weight": (3 * c, c),
        "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c),
        "attn.c_proj.bias": (c,),
        "ln_2.weight": (c,),
        "ln_2.bias": (c,),
        "mlp.c_fc.weight": (f, c),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (c, f),
        "mlp.c_proj.bias": (c,),
    }
    shapes: dict[str, tuple[int, ...]] = {"wpe.weight": (config.block_size, c)}
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,), "wte.weight": (config.vocab_size, c)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, c)
    if config.labels:
        shapes[CLASS_HEAD] = (len(config.labels), c)
    return shapes


def max_layers(dtype: str) -> int:
    """The most layers whose tensors a file may list."""
    return (MAX_TENSORS - 10) // (20 if dtype == "int8" else 12)


def stored_tensors(config: GPTConfig, dtype: str) -> tuple[StoredTensor, ...]:
    """Every tensor of a file, in order and without holes. ``n_layer`` is at most `max_layers`."""
    tensors = []
    begin = 0
    for canonical, shape in canonical_shapes(config).items():
        for name, kind, stored_shape in _stored_as(config, dtype, canonical, shape):
            end = begin + math.prod(stored_shape) * STORED_TYPES[kind].itemsize
            tensors.append(StoredTensor(name, kind, stored_shape, begin, end))
            begin = end
    return tuple(tensors)


def store(
    config: GPTConfig, dtype: str, name: str, array: NDArray[np.float32]
) -> dict[str, NDArray]:
    """The stored tensors of one canonical tensor, in the order of the file.

    Raises:
        OverflowError: a value does not fit into bfloat16.
    """
    if not _is_matrix(name):
        return {name: _pad_vector(config, name, array)}
    if dtype == "float32":
        return {name: packing.pack_panels(_pad_rows(config, name, array))}
    if dtype == "bfloat16":
        bits = quantize.round_bfloat16(array)
        return {name: packing.pack_panels(_pad_rows(config, name, bits), 2)}
    q, scale, colsum = quantize.quantize_rows(array)
    base = name.removesuffix(".weight")
    return {
        name: packing.pack_panels(_pad_rows(config, name, q), 4),
        f"{base}.scale": _pad_rows(config, name, scale),
        f"{base}.colsum": _pad_rows(config, name, colsum),
    }


def restore(
    config: GPTConfig, dtype: str, name: str, tensors: Mapping[str, NDArray]
) -> NDArray[np.float32]:
    """The canonical tensor as the core sees it, ``[out, in]`` float32, after the rounding.

    For float32 this is exactly what was stored; for bfloat16 and int8 the rounded values.
    """
    raw = _real_part(config, name, tensors[name])
    if dtype == "bfloat16" and _is_matrix(name):
        return quantize.expand_bfloat16(raw)
    if dtype == "int8" and _is_matrix(name):
        scale = tensors[name.removesuffix(".weight") + ".scale"]
        return quantize.dequantize_rows(raw, _real_rows(config, name, scale, raw.shape[0]))
    return raw


def repack(
    config: GPTConfig, dtype: str, name: str, tensors: Mapping[str, NDArray]
) -> dict[str, NDArray]:
    """What the stored tensors of one canonical tensor must be, given their real values.

    Differs from ``tensors`` where padding is not zero or a colsum is not the sum of its row.
    """
    real = _real_part(config, name, tensors[name])
    if not _is_matrix(name):
        return {name: _pad_vector(config, name, real)}
    group = _MATRIX_TYPE[dtype][1]
    packed = {name: packing.pack_panels(_pad_rows(config, name, real), group)}
    if dtype == "int8":
        base = name.removesuffix(".weight")
        scale = _real_rows(config, name, tensors[f"{base}.scale"], real.shape[0])
        packed[f"{base}.scale"] = _pad_rows(config, name, scale)
        packed[f"{base}.colsum"] = _pad_rows(config, name, real.sum(axis=1, dtype=np.int32))
    return packed


def _real_part(config: GPTConfig, name: str, stored: NDArray) -> NDArray:
    shape = canonical_shapes(config)[name]
    if name in _ROWS:
        return np.ascontiguousarray(stored[:, : shape[1]])
    if _is_matrix(name):
        stored = packing.unpack_panels(stored, _n_rows(config, name, shape[0]), shape[1])
    return _real_rows(config, name, stored, shape[0])


def _stored_as(
    config: GPTConfig, dtype: str, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    rows = _n_rows(config, name, shape[0])
    if not _is_matrix(name):
        yield name, "F32", (shape[0], padded(shape[1])) if len(shape) == 2 else (rows,)
        return
    kind, group = _MATRIX_TYPE[dtype]
    yield name, kind, packing.packed_shape(rows, shape[1], group)
    if dtype == "int8":
        base = name.removesuffix(".weight")
        yield f"{base}.scale", "F32", (rows,)
        yield f"{base}.colsum", "I32", (rows,)


def _is_matrix(name: str) -> bool:
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) or name in (
        "wte.weight",
        "lm_head.weight",
    )


def _is_head_major(name: str) -> bool:
    return ".c_attn." in name


def _n_rows(config: GPTConfig, name: str, rows: int) -> int:
    if _is_head_major(name):
        return packing.head_major_rows(config.n_embd, config.n_head)
    return padded(rows)


def _pad_vector(config: GPTConfig, name: str, array: NDArray) -> NDArray:
    if array.ndim == 2:
        return packing.pad_end(array, padded(array.shape[1], LANES), axis=1)
    return _pad_rows(config, name, array)


def _pad_rows(config: GPTConfig, name: str, rows: NDArray) -> NDArray:
    if _is_head_major(name):
        return packing.to_head_major(rows, config.n_head)
    return packing.pad_end(rows, padded(rows.shape[0]))


def _real_rows(config: GPTConfig, name: str, rows: NDArray, n: int) -> NDArray:
    if _is_head_major(name):
        return packing.from_head_major(rows, config.n_head, config.n_embd)
    return rows[:n]
