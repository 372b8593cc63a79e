"""XXH64 and the checksum tree in plain Python: slow, and from the text of the specification.

https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import struct

_MASK = 2**64 - 1
_P1 = 0x9E3779B185EBCA87
_P2 = 0xC2B2AE3D27D4EB4F
_P3 = 0x165667B19E3779F9
_P4 = 0x85EBCA77C2B2AE63
_P5 = 0x27D4EB2F165667C5


def _rotate(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & _MASK


def _round(accumulator: int, lane: int) -> int:
    return _rotate((accumulator + lane * _P2) & _MASK, 31) * _P1 & _MASK


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of a byte string."""
    size, at = len(data), 0
    if size >= 32:
        accumulators = [seed + _P1 + _P2, seed + _P2, seed, seed - _P1]
        accumulators = [a & _MASK for a in accumulators]
        while at + 32 <= size:
            lanes = struct.unpack_from("<4Q", data, at)
            accumulators = [_round(a, lane) for a, lane in zip(accumulators, lanes, strict=True)]
            at += 32
        h = sum(_rotate(a, bits) for a, bits in zip(accumulators, (1, 7, 12, 18), strict=True))
        h &= _MASK
        for a in accumulators:
            h = ((h ^ _round(0, a)) * _P1 + _P4) & _MASK
    else:
        h = (seed + _P5) & _MASK
    h = (h + size) & _MASK
    while at + 8 <= size:
        (lane,) = struct.unpack_from("<Q", data, at)
        h = (_rotate(h ^ _round(0, lane), 27) * _P1 + _P4) & _MASK
        at += 8
    if at + 4 <= size:
        (lane,) = struct.unpack_from("<I", data, at)
        h = (_rotate(h ^ (lane * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in data[at:]:
        h = _rotate(h ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    h = (h ^ h >> 33) * _P2 & _MASK
    h = (h ^ h >> 29) * _P3 & _MASK
    return h ^ h >> 32


def tree(data: bytes, chunk: int = 1 << 20) -> int:
    """XXH64 of the little-endian digests of the chunks; no data counts as one empty chunk."""
    chunks = [data[at : at + chunk] for at in range(0, max(len(data), 1), chunk)]
    return xxh64(b"".join(xxh64(part).to_bytes(8, "little") for part in chunks))
