"""The checksums of the core against their twin in plain Python."""

from __future__ import annotations

import random

import pytest

from gptx import _core
from xxh64 import tree, xxh64

SIZES = [0, 1, 3, 4, 7, 8, 15, 31, 32, 33, 63, 64, 65, 100, 1000]


def test_the_twin_gives_published_values() -> None:
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"a") == 0xD24EC4F1A98C6E5B
    assert xxh64(b"abc") == 0x44BC2CF5AD770999


@pytest.mark.parametrize("size", SIZES)
def test_xxh64_equals_its_twin(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert _core.xxh64(data) == xxh64(data)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tree_checksums_equal_their_twin_for_any_number_of_threads(threads: int) -> None:
    sizes = [0, 1, 64, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
    buffers = [random.Random(size).randbytes(size) for size in sizes]
    assert _core.checksums(buffers, threads) == _expected(tuple(buffers))


_cache: dict[tuple[bytes, ...], list[int]] = {}


def _expected(buffers: tuple[bytes, ...]) -> list[int]:
    if buffers not in _cache:
        _cache[buffers] = [tree(buffer) for buffer in buffers]
    return _cache[buffers]


def test_swapped_chunks_change_the_tree_checksum() -> None:
    one, two = b"\1" * (1 << 20), b"\2" * (1 << 20)
    assert _core.checksums([one + two], 1) != _core.checksums([two + one], 1)
