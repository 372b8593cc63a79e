"""Branches in files: the tokens, and their keys and values, so that nothing is computed again.

Layout, little-endian: 16 bytes ``gptx session 1\\n\\0``, then u64 XXH64 of all that follows, u64
length of a JSON header, the header, the token ids as int32, the KV blocks as the device has them.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptx import _core
from gptx.branch import Branch
from gptx.errors import ModelFileError, ParameterError
from gptx.modelfile.atomic import AtomicFile

if TYPE_CHECKING:
    from gptx.model import Model

_MAGIC = b"gptx session 1\n\0"
_PREFIX = struct.Struct("<QQ")  # checksum, length of the header
_MAX_HEADER = 4096
_REMEDY = "the file is damaged or no session; compute the text again with Model.branch"


def save(branch: Branch, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a branch to a file, whole or not at all.

    Args:
        branch: of any length.
        path: the file.
        force: replace a file that exists.

    Raises:
        ParameterError, ConvertError: as when a model file is written.
    """
    model = branch._model
    ids = np.array(branch.ids, "<i4")
    header = json.dumps(_origin(model) | {"tokens": len(ids)}).encode()
    body = struct.pack("<Q", len(header)) + header + ids.tobytes()
    body += model._engine.save(branch._alive())
    checksum = struct.pack("<Q", _core.xxh64(body))
    with AtomicFile(path, len(_MAGIC) + 8 + len(body), force=force) as file:
        file.write(_MAGIC + checksum)
        file.write(body)


def restore(model: Model, path: str | os.PathLike[str]) -> Branch:
    """The branch of a file, with the logits of its last token.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: it is damaged or no session.
        ParameterError: it was saved with another model, precision or device; ``param`` says which.
    """
    path = Path(path)
    data = path.read_bytes()
    start = len(_MAGIC) + _PREFIX.size
    if len(data) < start or not data.startswith(_MAGIC):
        raise ModelFileError(path, "magic", 0, _MAGIC, data[: len(_MAGIC)], _REMEDY)
    checksum, length = _PREFIX.unpack_from(data, len(_MAGIC))
    found = _core.xxh64(data[len(_MAGIC) + 8 :])
    if found != checksum:
        expected = f"{checksum:016x}"
        raise ModelFileError(path, "checksum", len(_MAGIC), expected, f"{found:016x}", _REMEDY)
    header = _header(path, data, start, length)
    for name, value in _origin(model).items():
        if header.get(name) != value:
            raise ParameterError(name, value, f"{header.get(name)!r}, with which {path} was saved")
    begin = start + length
    end = begin + 4 * header["tokens"]
    ids = np.frombuffer(data[begin:end], "<i4")
    request = model._engine.restore(ids, data[end:])
    branch = Branch(model, request, hidden=False)
    branch._compute()
    return branch


def _header(path: Path, data: bytes, start: int, length: int) -> dict[str, Any]:
    """The checksum holds, so this is what `save` wrote, or made on purpose to look like it."""
    try:
        if length > _MAX_HEADER:
            raise ValueError(f"{length} bytes")
        header = json.loads(data[start : start + length])
        tokens = header["tokens"]
        if type(tokens) is not int or not 1 <= tokens <= (len(data) - start - length) // 4:
            raise ValueError(f"{tokens!r} tokens")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(path, "header", start, "a session", str(error), _REMEDY) from None
    return header


def _origin(model: Model) -> dict[str, Any]:
    """What has to be the same for keys and values to be worth anything."""
    return {
        "model": fingerprint(model),
        "precision": model.precision,
        "kv_cache_dtype": model.kv_cache_dtype,
        "device": model.device.partition(":")[0],
        "kv_block_bytes": model._engine.kv_block_bytes,
    }


def fingerprint(model: Model) -> str:
    """16 hex digits of the weights and the shape of a model."""
    source = model._source
    names = sorted(source.tensors)
    sums = source.checksums or {
        name: f"{value:016x}"
        for name, value in zip(
            names, _core.checksums([source.tensors[n] for n in names], model.threads), strict=True
        )
    }
    text = json.dumps([source.config.to_dict(), [sums[name] for name in names]])
    return f"{_core.xxh64(text.encode()):016x}"
