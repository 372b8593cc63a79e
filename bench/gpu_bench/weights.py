"""Random weights of any size in seconds: drawn from a pool, packed by all threads, kept on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import workloads
from gptx.config import GPTConfig
from gptx.modelfile import canonical_shapes
from gptx.modelfile.layout import STORED_TYPES, restore, store, stored_tensors

_POOL = 1_000_003  # a prime: no row length divides it


def config_named(model: str) -> GPTConfig:
    """The shape of gpt2-xl, or one of those in `workloads`."""
    if model != "gpt2-xl":
        return workloads.config_named(model)
    return GPTConfig(
        vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600, n_inner=6400
    )


class PooledTensors(Mapping[str, NDArray[np.float32]]):
    """Canonical tensors like `workloads.RandomTensors`, copied instead of drawn.

    Each million values is one pool of normal numbers from another random beginning. What is
    measured does not see the repetition: no cache is indexed by contents.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        self._shapes = canonical_shapes(config)
        self._residual_std = 0.02 / (2 * config.n_layer) ** 0.5
        self._seed = seed
        pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
        self._twice = np.concatenate([pool, pool])  # a pool from any beginning is one slice

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        shape = self._shapes[name]
        rng = np.random.default_rng([self._seed, list(self._shapes).index(name)])
        values = np.empty(math.prod(shape), dtype=np.float32)
        for begin in range(0, values.size, _POOL):
            part = values[begin : begin + _POOL]
            start = int(rng.integers(_POOL))
            part[:] = self._twice[start : start + part.size]
        values *= np.float32(self._residual_std if name.endswith("c_proj.weight") else 0.02)
        if ".ln_" in name or name.startswith("ln_f"):
            values += np.float32(name.endswith("weight"))
        return values.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def pack(
    config: GPTConfig, dtype: str, tensors: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray]:
    """Stored tensors as the core takes them, packed by all threads."""
    packed: dict[str, NDArray] = {}
    for part in _map(lambda name: store(config, dtype, name, tensors[name]), tensors):
        packed |= part
    return packed


def unpack(
    config: GPTConfig, dtype: str, packed: Mapping[str, NDArray]
) -> dict[str, NDArray[np.float32]]:
    """Canonical float32 tensors, matrices ``[out, in]``: the values that ``packed`` stands for."""
    names = list(canonical_shapes(config))
    values = _map(lambda name: restore(config, dtype, name, packed), names)
    return dict(zip(names, values, strict=True))


def file_of(folder: Path, model: str, dtype: str) -> Path:
    """Where `prepare` keeps the random weights of a model."""
    return folder / f"{model}.{dtype}.weights"


def prepare(folder: Path, model: str, dtype: str) -> Path:
    """Writes the random weights of a model, unless they are there."""
    config = config_named(model)
    path = file_of(folder, model, dtype)
    table = {tensor.name: tensor for tensor in stored_tensors(config, dtype)}
    size = max(tensor.end for tensor in table.values())
    if path.exists() and path.stat().st_size == size:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = PooledTensors(config)
    with partial.open("wb") as out:

        def write(name: str) -> None:
            for stored, array in store(config, dtype, name, tensors[name]).items():
                os.pwrite(out.fileno(), array.data, table[stored].begin)

        _map(write, tensors)
    partial.rename(path)
    return path


def load(folder: Path, model: str, dtype: str) -> dict[str, NDArray]:
    """The stored tensors that `prepare` wrote."""
    buffer = np.fromfile(file_of(folder, model, dtype), dtype=np.uint8)
    return {
        tensor.name: buffer[tensor.begin : tensor.end]
        .view(STORED_TYPES[tensor.dtype])
        .reshape(tensor.shape)
        for tensor in stored_tensors(config_named(model), dtype)
    }


def _map(work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    """Large numpy operations run without the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(work, names))
