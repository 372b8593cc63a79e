"""Writes model files: one tensor in memory at a time, the file whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptx import _core
from gptx.config import GPTConfig
from gptx.errors import ConvertError, ParameterError
from gptx.modelfile import header as spec
from gptx.modelfile import layout
from gptx.modelfile.atomic import AtomicFile
from gptx.modelfile.reader import read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptx.tokenizer import TokenizerSpec

Progress = Callable[[str, int, int], None]


def write(
    path: str | os.PathLike[str],
    config: GPTConfig,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    dtype: str = "float32",
    tokenizer: TokenizerSpec | None = None,
    generation: Mapping[str, object] | None = None,
    source: str = "",
    license: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a model file. The same arguments give the same bytes.

    Args:
        path: the destination; a symbolic link is followed.
        config: the shape of the model.
        tensors: every canonical tensor and no other, float32, matrices ``[out, in]``. Each is asked
            for once, in the order of the file, so the mapping may produce them one at a time.
        dtype: of the matrices: ``float32``, ``bfloat16`` or ``int8``.
        tokenizer: embedded where given; its ids must be ids of the model.
        generation: default sampling parameters and token ids.
        source: one line about where the weights come from.
        license: of the weights.
        force: replace an existing file.
        progress: called after each tensor with its name, the bytes written and the bytes in all.

    Raises:
        ParameterError: an argument is outside what is allowed, or the file exists without force.
        ConvertError: a tensor is missing, extra, of the wrong shape or type, or not finite; or the
            file cannot be written. The destination is then what it was before.
    """
    metadata = _metadata(config, dtype, tokenizer, generation, source, license)
    stored = layout.stored_tensors(config, dtype)
    shapes = layout.canonical_shapes(config)
    _check_names(tensors, shapes)
    _, placeholder = _seal(metadata, stored, {tensor.name: spec.UNSEALED for tensor in stored})
    done, total = len(placeholder), len(placeholder) + stored[-1].end
    digests: dict[str, str] = {}
    threads = _core.usable_cpus()
    with AtomicFile(path, total, force=force) as file:
        file.write(placeholder)
        for name, shape in shapes.items():
            arrays = _stored(config, dtype, name, tensors[name], shape)
            digests |= zip(arrays, spec.tensor_digests(arrays.values(), threads), strict=True)
            for array in arrays.values():
                file.write(array.data)
                done += array.nbytes
            if progress is not None:
                progress(name, done, total)
        file.write(_seal(metadata, stored, digests)[1], at=0)


def update(path: str | os.PathLike[str], *, parity: Mapping[str, object] | None) -> None:
    """Replaces the parity report of a model file, atomically; tensors and their checksums stay.

    Raises:
        ParameterError: ``parity`` is not plain JSON with finite numbers.
        ModelFileError, OSError: the file cannot be read.
        ConvertError: it cannot be written; it is then what it was before.
    """
    text = "" if parity is None else _json("parity", parity, spec.parse_parity)
    model = read(path, verify=False)
    stored = layout.stored_tensors(model.config, model.dtype)
    digests = {tensor.name: model.checksums[tensor.name] for tensor in stored}
    _, head = _seal({**model.metadata, "parity": text}, stored, digests)
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    with AtomicFile(path, len(head) + stored[-1].end, force=True, mode=mode) as file:
        file.write(head)
        for tensor in stored:
            file.write(model.tensors[tensor.name].data)


def _seal(
    metadata: Mapping[str, str],
    stored: tuple[layout.StoredTensor, ...],
    digests: Mapping[str, str],
) -> tuple[dict[str, str], bytes]:
    complete, head = spec.seal(metadata, stored, digests)
    if len(head) > 8 + spec.MAX_HEADER:
        raise ConvertError(
            f"header: expected at most {spec.MAX_HEADER} bytes, got {len(head) - 8}; "
            f"the tokenizer takes {len(metadata['tokenizer'])} of them"
        )
    return complete, head


def _metadata(
    config: GPTConfig,
    dtype: str,
    tokenizer: TokenizerSpec | None,
    generation: Mapping[str, object] | None,
    source: str,
    license: str,
) -> dict[str, str]:
    if dtype not in layout.DTYPES:
        raise ParameterError("dtype", dtype, "one of " + ", ".join(layout.DTYPES))
    if config.n_layer > layout.max_layers(dtype):
        allowed = f"at most {layout.max_layers(dtype)}"
        raise ParameterError("n_layer", config.n_layer, allowed)
    shape = spec.dump(config.to_dict())
    if len(shape) > spec.MAX_SMALL_VALUE:
        raise ConvertError(
            f"labels: expected names of together at most {spec.MAX_SMALL_VALUE} characters as "
            f"JSON, got {len(shape)}; shorten them"
        )
    if tokenizer is not None and tokenizer.n_vocab > config.vocab_size:
        raise ConvertError(
            f"tokenizer: expected at most vocab_size = {config.vocab_size} token ids, "
            f"got {tokenizer.n_vocab}; choose the tokenizer that the model was trained with"
        )
    return {
        "config": shape,
        "dtype": dtype,
        "format": spec.FORMAT,
        "generation": _json("generation", generation or {}, spec.parse_generation),
        "license": _line("license", license),
        "parity": "",
        "source": _line("source", source),
        "tokenizer": "" if tokenizer is None else tokenizer.to_json(),
        "version": spec.VERSION,
    }


def _line(param: str, text: str) -> str:
    """Text that reading accepts: of bounded size and with an encoding."""
    allowed = f"a str of at most {spec.MAX_SMALL_VALUE} characters without lone surrogates"
    if not isinstance(text, str) or len(text) > spec.MAX_SMALL_VALUE:
        raise ParameterError(param, text, allowed)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ParameterError(param, text, allowed) from None
    return text


def _json(param: str, values: object, parse: Callable[[str], object]) -> str:
    """The canonical JSON of a value, if reading accepts it."""
    try:
        text = spec.dump(dict(values))  # type: ignore[call-overload]
        parse(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(param, values, f"plain finite JSON values: {error}") from None
    return _line(param, text)


def _check_names(
    tensors: Mapping[str, NDArray[np.float32]], shapes: dict[str, tuple[int, ...]]
) -> None:
    for name in shapes:
        if name not in tensors:
            raise ConvertError(f"tensor {name}: expected in the checkpoint, missing", tensor=name)
    for name in tensors:
        if name not in shapes:
            raise ConvertError(f"tensor {name!r}: not part of this GPT-2", tensor=name)


def _stored(
    config: GPTConfig, dtype: str, name: str, array: NDArray[np.float32], shape: tuple[int, ...]
) -> dict[str, NDArray]:
    if array.dtype != np.float32 or array.shape != shape:
        raise ConvertError(
            f"tensor {name}: expected float32 {list(shape)}, got {array.dtype} {list(array.shape)}",
            tensor=name,
        )
    if not np.isfinite(array).all():
        index = np.unravel_index(int(np.isfinite(array).argmin()), shape)
        place = ", ".join(map(str, index))
        raise ConvertError(
            f"tensor {name}: expected finite values, got {array[index]} at [{place}]; "
            "the checkpoint is damaged or its training diverged",
            tensor=name,
        )
    try:
        return layout.store(config, dtype, name, np.ascontiguousarray(array))
    except OverflowError as error:
        raise ConvertError(f"tensor {name}: {error}; use float32", tensor=name) from None
