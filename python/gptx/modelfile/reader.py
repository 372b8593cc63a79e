"""Opens model files: views on the mapped bytes, nothing copied."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptx import _core
from gptx.config import GPTConfig
from gptx.errors import ModelFileError, ParameterError
from gptx.modelfile import header as spec
from gptx.modelfile import layout
from gptx.modelfile.header import Header
from gptx.modelfile.parse import entry_is_damaged, parse_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptx.tokenizer import TokenizerSpec


_BEGIN = b'{"__metadata__":{"checksums":"{'


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model file that passed its checks. The arrays keep the mapping alive.

    Attributes:
        path: as given.
        config: the shape of the model.
        dtype: of the matrices: ``float32``, ``bfloat16`` or ``int8``.
        generation: default sampling parameters and token ids.
        parity: the report of the conversion, or None.
        source: one line about the checkpoint it was made from.
        license: of the weights.
        metadata: every metadata value as it stands in the file.
        checksums: name -> 16 hex digits.
        tensors: name -> read-only view in the stored layout, bfloat16 as uint16.
        data_start: byte of the first tensor.
        size: bytes of the file.
    """

    path: Path
    config: GPTConfig
    dtype: str
    generation: dict[str, object]
    parity: dict[str, object] | None
    source: str
    license: str
    metadata: dict[str, str]
    checksums: dict[str, str]
    tensors: dict[str, NDArray]
    data_start: int
    size: int

    @cached_property
    def tokenizer(self) -> TokenizerSpec | None:
        """The tokenizer, or None where the file has none. Read on first use.

        Raises:
            ModelFileError: it cannot be read, or has more token ids than the model.
        """
        text = self.metadata["tokenizer"]
        if not text:
            return None
        from gptx.tokenizer import TokenizerSpec

        try:
            tokenizer = TokenizerSpec.from_json(text)
        except ValueError as error:
            expected: object = f"a tokenizer ({error})"
            found: object = text
        else:
            if tokenizer.n_vocab <= self.config.vocab_size:
                return tokenizer
            expected = f"at most {self.config.vocab_size} token ids"
            found = tokenizer.n_vocab
        raise ModelFileError(self.path, "__metadata__.tokenizer", 8, expected, found)

    def weight(self, name: str) -> NDArray[np.float32]:
        """A canonical tensor, float32, ``[out, in]``, after the rounding of the file's dtype."""
        return layout.restore(self.config, self.dtype, name, self.tensors)


def is_model_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is meant to be a model file, by its name or its first bytes.

    The name counts so that a damaged file is called damaged, not unknown.
    """
    path = Path(path)
    if path.suffix == ".gptx":
        return True
    with path.open("rb") as file:
        return file.read(8 + len(_BEGIN))[8:] == _BEGIN


def read(
    path: str | os.PathLike[str], *, verify: bool = True, threads: int | None = None
) -> ModelFile:
    """Opens a model file.

    Args:
        path: a regular file.
        verify: compare the checksum of every tensor. The header is always checked in full.
        threads: for the checksums; None means as many as the process may use.

    Raises:
        ModelFileError: the file is not exactly what its header and the format demand.
        OSError: it cannot be opened (FileNotFoundError, PermissionError, ...).
    """
    path = Path(path)
    if threads is None:
        threads = _core.usable_cpus()
    elif type(threads) is not int or threads < 1:
        raise ParameterError("threads", threads, "an integer from 1")
    fd = _open_regular(path)
    try:
        size = os.fstat(fd).st_size
        with open(fd, "rb", buffering=0, closefd=False) as file:
            head = file.read(8 + spec.MAX_HEADER)
        header = parse_header(head, size, path)
        buffer = _map(path, size, head[: header.data_start])
        _check_tensors(header, buffer, path, verify, threads)
        _check_unchanged(path, size, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return _model_file(header, buffer, path)


def read_buffer(
    buffer: bytes | memoryview, *, verify: bool = True, path: str = "<memory>"
) -> ModelFile:
    """A model file that is in memory already; checks and errors are those of `read`."""
    view = memoryview(buffer)
    header = parse_header(bytes(view[: 8 + spec.MAX_HEADER]), len(view), path)
    _check_tensors(header, view, path, verify, threads=1)
    return _model_file(header, view, Path(path))


def verify(path: str | os.PathLike[str], *, threads: int | None = None) -> ModelFile:
    """Checks all there is to check: everything `read` checks, and the values of the tensors.

    That is: the tokenizer can be read, every value is finite, no scale is negative, padding is
    zero, and every colsum is the sum of its row.

    Raises:
        ModelFileError, OSError: as `read`.
    """
    model = read(path, threads=threads)
    model.tokenizer  # noqa: B018
    for name in layout.canonical_shapes(model.config):
        for stored, expected in layout.repack(
            model.config, model.dtype, name, model.tensors
        ).items():
            _check_array(model, stored, model.tensors[stored], expected)
    return model


def _open_regular(path: Path) -> int:
    # Without O_NONBLOCK the open of a FIFO would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise ModelFileError(path, "file type", 0, "a regular file", "a socket") from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device"}
        found = kinds.get(stat.S_IFMT(mode), "something else")
        raise ModelFileError(path, "file type", 0, "a regular file", found)
    return fd


def _map(path: Path, size: int, head: bytes) -> memoryview:
    """Maps the file, and makes sure that it is still the one whose header was judged."""
    try:
        # Bytes, since a name need not be valid UTF-8.
        mapped = memoryview(_core.MappedFile(os.fsencode(path)))  # type: ignore[arg-type]
    except OSError:
        _check_unchanged(path, size, path.stat().st_size)
        raise
    _check_unchanged(path, size, len(mapped))
    if mapped[: len(head)] != head:
        raise ModelFileError(path, "header", 0, "the header read before", "another one", _CHANGED)
    return mapped


_DAMAGED = "the file is damaged"
_CHANGED = "the file was replaced while it was opened; try again"


def _check_unchanged(path: Path, expected: int, found: int) -> None:
    if found != expected:
        offset = min(expected, found)
        raise ModelFileError(path, "file size", offset, f"{expected} bytes", found, _CHANGED)


def _check_tensors(
    header: Header, buffer: memoryview, path: object, verify: bool, threads: int
) -> None:
    if header.sealed and not verify:
        return
    start = header.data_start
    slices = [buffer[start + tensor.begin : start + tensor.end] for tensor in header.tensors]
    found = spec.tensor_digests(slices, threads)
    wrong = [
        (tensor, value)
        for tensor, value in zip(header.tensors, found, strict=True)
        if value != header.checksums[tensor.name]
    ]
    if header.sealed:
        for tensor, value in wrong:
            field, offset = f"checksum of {tensor.name}", start + tensor.begin
            expected = header.checksums[tensor.name]
            raise ModelFileError(path, field, offset, expected, value, _DAMAGED)
        return
    if len(wrong) == 1:
        name, value = wrong[0][0].name, wrong[0][1]
        if entry_is_damaged(bytes(buffer[:start]), name, value, header.metadata):
            field = f"__metadata__.checksums.{name}"
            raise ModelFileError(path, field, 8, value, header.checksums[name], _DAMAGED)
    field, expected = "__metadata__.header_checksum", "the checksum of the header"
    raise ModelFileError(path, field, 8, expected, header.metadata["header_checksum"], _DAMAGED)


def _model_file(header: Header, buffer: memoryview, path: Path) -> ModelFile:
    return ModelFile(
        path=path,
        config=header.config,
        dtype=header.dtype,
        generation=spec.parse_generation(header.metadata["generation"]),
        parity=spec.parse_parity(header.metadata["parity"]),
        source=header.metadata["source"],
        license=header.metadata["license"],
        metadata=header.metadata,
        checksums=header.checksums,
        tensors=dict(_views(header, buffer)),
        data_start=header.data_start,
        size=len(buffer),
    )


def _views(header: Header, buffer: memoryview) -> Iterator[tuple[str, NDArray]]:
    for tensor in header.tensors:
        dtype = layout.STORED_TYPES[tensor.dtype]
        count = (tensor.end - tensor.begin) // dtype.itemsize
        flat = np.frombuffer(buffer, dtype, count, header.data_start + tensor.begin)
        view = flat.reshape(tensor.shape)
        view.flags.writeable = False
        yield tensor.name, view


def _check_array(model: ModelFile, name: str, found: NDArray, expected: NDArray) -> None:
    """Finite, not negative where it is a scale, and equal to what its real values demand."""
    tensor_at = found.__array_interface__["data"][0]
    first = next(iter(model.tensors.values())).__array_interface__["data"][0]
    offset = model.data_start + tensor_at - first

    def check(wrong: NDArray[np.bool_], allowed: str) -> None:
        if not wrong.any():
            return
        index = int(wrong.argmax())
        at = offset + index * found.itemsize
        raise ModelFileError(model.path, name, at, allowed, found.reshape(-1)[index].item())

    flat = found.reshape(-1)
    if found.dtype == np.float32:
        check(~np.isfinite(flat), "finite values")
    elif found.dtype == np.uint16:
        check((flat & 0x7F80) == 0x7F80, "finite values")
    if name.endswith(".scale"):
        check(flat < 0, "a scale of at least 0")
    elif name.endswith(".colsum"):
        check(flat != expected.reshape(-1), "the sum of the row")
        return
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[found.itemsize]
    check(flat.view(bits) != expected.reshape(-1).view(bits), "zeros for padding")
