"""Files of ``torch.save`` without torch: plain values, and tensors that are read on demand.

The closed table below is everything a torch file may name. Storages are checked against their
records before any tensor is made of them, tensors against their storages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.checkpoints.pickle_reader import (
    MAX_PICKLE,
    Buildable,
    Constructor,
    OrderedDict,
    describe,
    read_pickle,
)
from gptx.checkpoints.source import NUMPY_DTYPES, SourceFile, SourceTensor
from gptx.checkpoints.torch_zip import Entry, TorchZip
from gptx.errors import ConvertError, ModelFileError

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_KEY = re.compile(r"[0-9]{1,9}")
_MAX_DIMS = 8
_MAX_DIM = 2**31 - 1

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_SCALARS = {
    "f8": "<f8", "f4": "<f4", "f2": "<f2", "i8": "<i8", "i4": "<i4", "i2": "<i2", "i1": "|i1",
    "u8": "<u8", "u4": "<u4", "u2": "<u2", "u1": "|u1", "b1": "|b1",
}  # fmt: skip


def is_torch_zip(file: SourceFile) -> bool:
    """Whether the file begins like a zip archive."""
    return file.size >= 4 and file.read(0, 4, "magic").tobytes() == b"PK\3\4"


def read_torch_file(path: Path) -> object:
    """The object that ``torch.save`` wrote, tensors as `SourceTensor`.

    Raises:
        UnsafeCheckpointError: the file asks for more than tensors and plain values.
        ModelFileError: the file is damaged.
        ConvertError: a TorchScript archive, or one of big-endian data.
    """
    archive = TorchZip(path)
    if "constants.pkl" in archive.entries or any(n.startswith("code/") for n in archive.entries):
        remedy = 'save its weights: torch.save(torch.jit.load(...).state_dict(), "weights.pt")'
        raise ConvertError(f"{path}: expected saved tensors, got a TorchScript archive; {remedy}")
    if "byteorder" in archive.entries and archive.read("byteorder", 16) != b"little":
        raise ConvertError(f"{path}: expected little-endian data, got a big-endian file")
    builder = _Tensors(archive)
    return read_pickle(
        archive.read("data.pkl", MAX_PICKLE), path, {**_PLAIN, **builder.table}, builder.storage
    )


def read_plain_pickle(path: Path) -> object:
    """The value of a pickle file of plain values, such as nanoGPT's ``meta.pkl``.

    Raises:
        UnsafeCheckpointError, ModelFileError: as `gptx.checkpoints.pickle_reader.read_pickle`.
        ConvertError: a checkpoint in the format of torch before 1.6.
    """
    file = SourceFile(path)
    if file.size > MAX_PICKLE:
        raise ModelFileError(path, "pickle", 0, f"at most {MAX_PICKLE} bytes", file.size)
    data = file.read(0, file.size, "pickle").tobytes()
    return read_pickle(data, path, {})


def is_legacy_torch(file: SourceFile) -> bool:
    """Whether torch before 1.6 (2020) wrote the file: a series of pickles, or a tar archive."""
    head = file.read(0, min(file.size, 512), "magic").tobytes()
    return head.startswith(_LEGACY_MAGIC) or head[257:262] == b"ustar"


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    entry: Entry
    dtype: str
    numel: int


@dataclass
class _NumpyType(Buildable):
    code: str

    def set_state(self, state: object) -> None:
        """Accepts the state of a plain little-endian dtype."""
        fields = state[:2] if type(state) is tuple else ()
        if fields not in ((3, "<"), (3, "|")):
            raise ValueError("only plain little-endian numpy scalars are read")


class _Tensors:
    """Makes tensors out of the records of one archive."""

    def __init__(self, archive: TorchZip) -> None:
        self.archive = archive
        self.dtypes: dict[str, str] = {}  # of each storage key: one key has one type
        self.table = {
            "torch._utils _rebuild_tensor_v2": Constructor(
                "torch._utils._rebuild_tensor_v2", self.tensor
            ),
            "torch._utils _rebuild_parameter": Constructor(
                "torch._utils._rebuild_parameter", _parameter
            ),
        }

    def storage(self, payload: object) -> _Storage:
        """The storage of a persistent id ``("storage", type, key, location, numel)``."""
        if type(payload) is not tuple or len(payload) != 5:
            raise ValueError("a persistent id is a tuple of 5")
        kind, storage_type, key, location, numel = payload
        if kind != "storage" or type(kind) is not str or type(storage_type) is not _StorageType:
            raise ValueError("a persistent id names a storage")
        if type(location) is not str or type(key) is not str or not _KEY.fullmatch(key):
            raise ValueError("the key of a storage is a number in text")
        entry = self.archive.entries.get(f"data/{key}")
        if entry is None:
            raise self._damaged(f"record data/{key}", 0, "one in the archive", "none")
        dtype = self.dtypes.setdefault(key, storage_type.dtype)
        if dtype != storage_type.dtype:
            raise ValueError(f"storage {key} is {dtype} and {storage_type.dtype}")
        size = np.dtype(NUMPY_DTYPES[dtype]).itemsize
        if type(numel) is not int or numel != entry.size // size:
            expected = f"{entry.size // size} elements in {entry.size} bytes"
            raise self._damaged(f"record data/{key}", entry.offset, expected, describe(numel))
        return _Storage(entry, dtype, numel)

    def tensor(self, args: tuple[object, ...]) -> SourceTensor:
        """torch's ``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``."""
        if len(args) not in (6, 7) or (len(args) == 7 and args[6] not in (None, {})):
            raise ValueError("a tensor takes 6 arguments and no metadata")
        storage, offset, shape, strides, requires_grad, hooks = args[:6]
        if type(storage) is not _Storage or type(requires_grad) is not bool:
            raise ValueError("the arguments are not those of a tensor")
        if type(hooks) is not OrderedDict or hooks:
            raise ValueError("a tensor with hooks")
        sizes, steps = _dimensions(shape, "shape"), _dimensions(strides, "stride")
        if len(sizes) != len(steps) or type(offset) is not int:
            raise ValueError("shape, stride and offset do not belong together")
        last = offset + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
        inside = 0 <= offset <= storage.numel if 0 in sizes else 0 <= offset <= last < storage.numel
        if not inside:
            expected = f"a tensor inside the {storage.numel} elements of its storage"
            found = f"offset {offset}, shape {sizes}, stride {steps}"
            field = f"record {storage.entry.name}"
            raise self._damaged(field, storage.entry.offset, expected, found)
        if math.prod(sizes) > storage.numel:
            # An expanded view could ask for any amount of memory.
            raise ValueError(f"shape {sizes} with stride {steps} uses elements more than once")
        place = (str(self.archive.path), storage.entry.name, offset, sizes, steps)
        load = _loader(self.archive, storage, offset, sizes, steps)
        return SourceTensor("", sizes, storage.dtype, place, load)

    def _damaged(self, field: str, offset: int, expected: object, found: object) -> ModelFileError:
        return ModelFileError(self.archive.path, field, offset, expected, found)


def _dimensions(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        raise ValueError(f"the {what} of a tensor is a tuple of at most {_MAX_DIMS}")
    if any(type(item) is not int or not 0 <= item <= _MAX_DIM for item in value):
        raise ValueError(f"the {what} of a tensor has sizes from 0 to {_MAX_DIM}")
    return value


def _loader(
    archive: TorchZip,
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Callable[[], np.ndarray]:
    dtype = np.dtype(NUMPY_DTYPES[storage.dtype])
    steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    span = 0 if 0 in shape else sum(steps) + 1

    def load() -> np.ndarray:
        data = archive.read_range(storage.entry, offset * dtype.itemsize, span * dtype.itemsize)
        byte_strides = tuple(s * dtype.itemsize for s in strides)
        view = np.lib.stride_tricks.as_strided(data.view(dtype), shape, byte_strides)
        return np.ascontiguousarray(view).reshape(shape)

    return load


def _parameter(args: tuple[object, ...]) -> object:
    """torch's ``_rebuild_parameter(tensor, requires_grad, hooks)``: the tensor."""
    if len(args) != 3 or type(args[0]) is not SourceTensor or type(args[1]) is not bool:
        raise ValueError("a parameter takes a tensor, requires_grad and no hooks")
    if type(args[2]) is not OrderedDict or args[2]:
        raise ValueError("a parameter with hooks")
    return args[0]


def _ordered_dict(args: tuple[object, ...]) -> OrderedDict:
    if args:
        raise ValueError("an OrderedDict starts empty")
    return OrderedDict()


def _size(args: tuple[object, ...]) -> object:
    if len(args) != 1:
        raise ValueError("a size takes one tuple")
    return _dimensions(args[0], "size")


def _device(args: tuple[object, ...]) -> str:
    number = args[1:]
    if (
        len(args) not in (1, 2)
        or type(args[0]) is not str
        or any(type(n) is not int for n in number)
    ):
        raise ValueError("a device takes a name and a number")
    return args[0]


def _encode(args: tuple[object, ...]) -> bytes:
    """``_codecs.encode(text, "latin1")``: how protocol 2 spells bytes."""
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise ValueError("only bytes spelled in latin1 are read")
    return args[0].encode("latin1")


def _empty_bytes(args: tuple[object, ...]) -> bytes:
    """How protocol 2 spells ``b""``."""
    if args:
        raise ValueError("only empty bytes are spelled so")
    return b""


def _numpy_type(args: tuple[object, ...]) -> _NumpyType:
    if len(args) != 3 or type(args[0]) is not str or args[0] not in _SCALARS:
        raise ValueError("only numbers of numpy are read")
    return _NumpyType(args[0])


def _numpy_scalar(args: tuple[object, ...]) -> object:
    if len(args) != 2 or type(args[0]) is not _NumpyType or type(args[1]) is not bytes:
        raise ValueError("a numpy scalar takes a dtype and bytes")
    dtype = np.dtype(_SCALARS[args[0].code])
    if len(args[1]) != dtype.itemsize:
        raise ValueError("a numpy scalar of another size than its dtype")
    return np.frombuffer(args[1], dtype)[0].item()


_DTYPE_NAMES = (*_STORAGES.values(), "complex64", "complex128")

_PLAIN: dict[str, object] = {
    "collections OrderedDict": Constructor("collections.OrderedDict", _ordered_dict),
    "torch Size": Constructor("torch.Size", _size),
    "torch device": Constructor("torch.device", _device),
    "_codecs encode": Constructor("_codecs.encode", _encode),
    "__builtin__ bytes": Constructor("bytes", _empty_bytes),
    "numpy dtype": Constructor("numpy.dtype", _numpy_type),
    "numpy.core.multiarray scalar": Constructor("numpy.core.multiarray.scalar", _numpy_scalar),
    "numpy._core.multiarray scalar": Constructor("numpy._core.multiarray.scalar", _numpy_scalar),
    **{f"torch {name}": f"torch.{name}" for name in _DTYPE_NAMES},
    **{f"torch {name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
}
