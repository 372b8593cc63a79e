"""A foreign file on disk and the tensors in it, read piece by piece.

Files are read with plain reads, not mapped: a file that shrinks while it is read gives an error,
not a signal. Each read opens the file anew and compares its identity with the first opening.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.errors import ConvertError, ModelFileError

NUMPY_DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",  # bit patterns; numpy has no bfloat16
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "|u1",
    "bool": "|b1",
}
"""Element types of source tensors, and the numpy type of their bytes."""

FLOATS = ("float64", "float32", "float16", "bfloat16")

MAX_JSON = 16 << 20
_MAX_JSON_DEPTH = 32


class SourceFile:
    """A regular file that must not change while it is converted.

    Attributes: ``path``; ``size`` in bytes.

    Raises:
        FileNotFoundError, PermissionError: as the system says.
        ConvertError: the path is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConvertError(f"{self.path}: expected a regular file")
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, offset: int, size: int, field: str) -> np.ndarray:
        """``size`` bytes from ``offset`` as a new uint8 array; ``field`` names them in errors."""
        if offset < 0 or size < 0 or offset + size > self.size:
            expected = f"{size} bytes inside the file"
            found = f"a file of {self.size} bytes"
            raise ModelFileError(self.path, field, offset, expected, found, TRUNCATED)
        data = np.empty(size, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise ConvertError(f"{self.path}: the file changed while it was read; start again")
            file.seek(offset)
            view, done = data.data, 0
            while done < size:
                count = file.readinto(view[done:])
                if not count:
                    expected, found = f"{size} bytes", f"{done} bytes"
                    raise ModelFileError(self.path, field, offset, expected, found, TRUNCATED)
                done += count
        return data


TRUNCATED = "the file is truncated or damaged: copy or download it again"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint whose data is still in its file.

    Attributes:
        name: as the checkpoint spells it ("" until it is known).
        shape: as stored.
        dtype: a key of ``NUMPY_DTYPES``.
        place: equal for two tensors that are the same bytes of the same file.
        load: reads the data, a new array of ``shape`` in the numpy type of ``dtype``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Hashable
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the data in its own type."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize

    def read(self) -> np.ndarray:
        """The data as a new float32 array of ``shape``.

        Raises:
            ConvertError: not a floating-point tensor, or a value is not finite in float32.
        """
        if self.dtype not in FLOATS:
            message = f"tensor {self.name}: expected {', '.join(FLOATS)}, got {self.dtype}"
            raise ConvertError(message, tensor=self.name)
        raw = self.load()
        if self.dtype == "bfloat16":
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                values = raw.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            index = tuple(int(i) for i in np.argwhere(~finite)[0])
            value = float(values[index] if self.dtype == "bfloat16" else raw[index])
            message = f"tensor {self.name}: expected finite float32 weights, got {value} at index"
            raise ConvertError(f"{message} {list(index)}", tensor=self.name)
        return values


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        FileNotFoundError: there is none.
        ConvertError: too large, not JSON, or not an object.
    """
    file = SourceFile(path)
    if file.size > MAX_JSON:
        raise ConvertError(f"{path}: expected at most {MAX_JSON} bytes of JSON, got {file.size}")
    try:
        value = parse_json(file.read(0, file.size, "JSON").tobytes())
    except ValueError as error:
        raise ConvertError(f"{path}: not valid JSON: {error}") from None
    if type(value) is not dict:
        raise ConvertError(f"{path}: expected a JSON object")
    return value


def parse_json(data: bytes) -> object:
    """Strict JSON: UTF-8, no key twice, no NaN or infinity, at most 32 levels deep.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH} levels") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH} levels")
        lists = [item for item in level if type(item) is list]
        dicts = [item.values() for item in level if type(item) is dict]
        level = [item for group in (*lists, *dicts) for item in group]
        level = [item for item in level if type(item) in (list, dict)]
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
