"""Reader of safetensors files, strict where the format says must.

Format: ``u64`` header length, a JSON header, the data. Every byte of the data belongs to exactly
one tensor; no key appears twice. See https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.checkpoints.source import (
    MAX_JSON,
    NUMPY_DTYPES,
    TRUNCATED,
    SourceFile,
    SourceTensor,
    parse_json,
)
from gptx.errors import ModelFileError

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_TENSORS = 65_536
_MAX_DIM = 2**31 - 1


def looks_like_safetensors(file: SourceFile) -> bool:
    """Whether the first nine bytes can begin a safetensors file."""
    if file.size < 9:
        return False
    head = file.read(0, 9, "header length").tobytes()
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def read_safetensors(path: Path) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """Tensors by name, in file order, and the ``__metadata__``. No tensor data is read.

    Raises:
        ModelFileError: the header is damaged or breaks a rule of the format.
    """
    file = SourceFile(path)
    header, start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise ModelFileError(path, "__metadata__", 8, "an object of strings", metadata)
    if len(header) > _MAX_TENSORS:
        raise ModelFileError(path, "header", 8, f"at most {_MAX_TENSORS} tensors", len(header))
    entries = [_entry(path, name, value) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_tiling(file, entries, start)
    return {entry.name: entry.tensor(file, start) for entry in entries}, metadata


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def tensor(self, file: SourceFile, start: int) -> SourceTensor:
        def load() -> np.ndarray:
            data = file.read(start + self.begin, self.end - self.begin, self.name)
            return data.view(NUMPY_DTYPES[self.dtype]).reshape(self.shape)

        place = (str(file.path), self.begin, self.end, self.shape)
        return SourceTensor(self.name, self.shape, self.dtype, place, load)


def _read_header(file: SourceFile) -> tuple[dict[str, object], int]:
    """The header as parsed, and the offset of the data."""
    path = file.path
    if file.size < 8:
        raise ModelFileError(path, "header length", 0, "8 bytes", f"{file.size} bytes", TRUNCATED)
    length = int.from_bytes(file.read(0, 8, "header length").tobytes(), "little")
    if length > MAX_JSON:
        raise ModelFileError(path, "header length", 0, f"at most {MAX_JSON}", length)
    if 8 + length > file.size:
        limit = f"at most {file.size - 8}, the size of the file"
        raise ModelFileError(path, "header length", 0, limit, length, TRUNCATED)
    text = file.read(8, length, "header").tobytes()
    if not text.startswith(b"{"):
        raise ModelFileError(path, "header", 8, "'{'", text[:1])
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ModelFileError(path, "header", 8, "valid JSON", str(error)) from None
    assert type(header) is dict
    return header, 8 + length


def _entry(path: Path, name: str, value: object) -> _Entry:
    field = f"tensor {name[:80]!r}"
    if type(value) is not dict or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(path, field, 8, "dtype, shape and data_offsets", type(value).__name__)
    dtype = value["dtype"]
    if type(dtype) is not str or dtype not in _DTYPES:
        raise ModelFileError(path, f"{field} dtype", 8, "one of " + ", ".join(_DTYPES), dtype)
    shape = value["shape"]
    if not _is_ints(shape, 8) or any(size > _MAX_DIM for size in shape):
        raise ModelFileError(path, f"{field} shape", 8, f"sizes from 0 to {_MAX_DIM}", shape)
    offsets = value["data_offsets"]
    if not _is_ints(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(path, f"{field} data_offsets", 8, "[begin, end]", offsets)
    size = math.prod(shape) * np.dtype(NUMPY_DTYPES[_DTYPES[dtype]]).itemsize
    if offsets[1] - offsets[0] != size:
        expected = f"{size} bytes for {dtype} {shape}"
        found = offsets[1] - offsets[0]
        raise ModelFileError(path, f"{field} data_offsets", 8, expected, found)
    return _Entry(name, _DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _is_ints(value: object, max_len: int) -> bool:
    return (
        type(value) is list
        and len(value) <= max_len
        and all(type(item) is int and item >= 0 for item in value)
    )


def _check_tiling(file: SourceFile, entries: list[_Entry], start: int) -> None:
    """Tensors follow each other without hole or overlap up to the end of the file."""
    at = 0
    for entry in entries:
        if entry.begin != at:
            field = f"tensor {entry.name[:80]!r} data_offsets"
            raise ModelFileError(file.path, field, start + at, f"begin {at}", entry.begin)
        at = entry.end
    if start + at != file.size:
        expected = f"a file of {start + at} bytes"
        found = f"{file.size} bytes"
        raise ModelFileError(file.path, "data", start, expected, found, TRUNCATED)
