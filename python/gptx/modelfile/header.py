"""The header of a model file: its one spelling, and the checksums in it. See docs/model-file.md."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptx import _core
from gptx.config import GPTConfig
from gptx.modelfile.layout import StoredTensor

FORMAT = "gptx"
VERSION = "1"
ALIGNMENT = 64
MAX_HEADER = 4 << 20
"""Bytes, without the 8 of the length."""
MAX_SMALL_VALUE = 64 << 10
"""Bytes of any metadata value but the tokenizer and the checksums."""

METADATA_KEYS = (
    "checksums",
    "config",
    "dtype",
    "format",
    "generation",
    "header_checksum",
    "license",
    "parity",
    "source",
    "tokenizer",
    "version",
)
UNSEALED = "0" * 16
"""Stands for a checksum while the header that will hold it is hashed or not complete."""

_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)
_GENERATION_KEY = r"[a-z][a-z0-9_]{0,63}"


class Header(NamedTuple):
    """A header that was read. ``sealed`` is false where its own checksum does not match."""

    config: GPTConfig
    dtype: str
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]
    checksums: dict[str, str]
    data_start: int
    sealed: bool


def dump(value: object) -> str:
    """The only accepted JSON of a value: sorted keys, no spaces, ASCII, no NaN."""
    return _ENCODER.encode(value)


def digest(data: bytes) -> str:
    """XXH64 as 16 hex digits."""
    return f"{_core.xxh64(data):016x}"


def tensor_digests(arrays: Iterable[Any], threads: int) -> list[str]:
    """The tree checksum of each array as 16 hex digits."""
    return [f"{value:016x}" for value in _core.checksums(list(arrays), threads)]


def tensor_entry(tensor: StoredTensor) -> str:
    """The JSON of one tensor: key and value."""
    shape = ",".join(map(str, tensor.shape))
    return (
        f'"{tensor.name}":{{"dtype":"{tensor.dtype}","shape":[{shape}],'
        f'"data_offsets":[{tensor.begin},{tensor.end}]}}'
    )


def encode(metadata: Mapping[str, str], tensors: Iterable[StoredTensor]) -> bytes:
    """Length, JSON and padding: everything before the first tensor."""
    entries = [f'"__metadata__":{dump(dict(metadata))}', *map(tensor_entry, tensors)]
    text = "{" + ",".join(entries) + "}"
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length).encode("ascii")


def value_digests(metadata: Mapping[str, str], config: Mapping[str, object]) -> dict[str, str]:
    """Digest of every metadata value but the checksums; the config counts value by value.

    With them a damaged value is named, not only found.
    """
    names = set(METADATA_KEYS) - {"checksums", "config", "header_checksum"}
    values = {f"__metadata__.{name}": metadata[name] for name in names}
    values |= {f"__metadata__.config.{name}": dump(value) for name, value in config.items()}
    return {name: digest(value.encode()) for name, value in values.items()}


def seal(
    metadata: Mapping[str, str], tensors: Iterable[StoredTensor], digests: Mapping[str, str]
) -> tuple[dict[str, str], bytes]:
    """Completes a header with the digests of its tensors; its length does not depend on them.

    Args:
        metadata: every key but ``checksums`` and ``header_checksum``.
        tensors: the tensors in order.
        digests: tensor name -> digest.

    Returns:
        The complete metadata, and the bytes before the first tensor.
    """
    tensors = tuple(tensors)
    config = json.loads(metadata["config"])
    checksums = dump({**digests, **value_digests(metadata, config)})
    complete = {**metadata, "checksums": checksums, "header_checksum": UNSEALED}
    complete["header_checksum"] = digest(encode(complete, tensors))
    return complete, encode(complete, tensors)


def parse_generation(text: str) -> dict[str, object]:
    """Generation defaults: an object of numbers, booleans, strings and lists of integers.

    Raises:
        ValueError: anything else; the message says what is allowed.
    """
    values = _parse_object(text)
    for key, value in values.items():
        if not re.fullmatch(_GENERATION_KEY, key):
            raise ValueError("keys of lower-case letters, digits and underscores")
        items = value if isinstance(value, list) else [value]
        allowed = (int,) if isinstance(value, list) else (int, float, bool, str)
        if not all(type(item) in allowed for item in items):
            raise ValueError(f"a number, true, false, a string or a list of integers as {key}")
    return values


def parse_parity(text: str) -> dict[str, object] | None:
    """A parity report: any JSON object, or None for no text. Raises as `parse_generation`."""
    return _parse_object(text) if text else None


def _parse_object(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
        canonical = dump(values) == text
    except (ValueError, RecursionError):
        raise ValueError("JSON without NaN and infinity") from None
    if not isinstance(values, dict) or not canonical:
        raise ValueError("an object with sorted keys and no spaces")
    return values
