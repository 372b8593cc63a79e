"""``from_pretrained``: where to run and in which precision, from transformers' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gptx.loading
from gptx import modelfile
from gptx.errors import ParameterError, UnsupportedError
from gptx.model import Model

_PRECISIONS = ("float32", "bfloat16", "int8", "int8-fast")
# How a file is read or attention is computed; gptx has its own ways.
_WITHOUT_EFFECT = (
    "low_cpu_mem_usage",
    "use_safetensors",
    "trust_remote_code",
    "local_files_only",
    "token",
    "attn_implementation",
    "offload_folder",
    "max_memory",
    "_from_auto",
)


def checked(kwargs: dict[str, Any]) -> None:
    """Takes out arguments without effect.

    Raises:
        UnsupportedError: an argument of transformers that gptx does not honour.
    """
    for name in _WITHOUT_EFFECT:
        kwargs.pop(name, None)
    for name, value in kwargs.items():
        if value not in (None, False):
            raise UnsupportedError(f"{name}: from_pretrained does not honour it, got {value!r:.80}")


def device_of(device_map: Any, name: str = "device_map") -> str:
    """A device of `gptx.load`.

    Raises:
        ParameterError: it is none.
    """
    where = device_map
    if isinstance(where, Mapping) and len(set(map(str, where.values()))) == 1:
        where = next(iter(where.values()))
    if isinstance(where, int) and not isinstance(where, bool):
        return "cpu" if where < 0 else f"cuda:{where}"
    where = "cpu" if where is None else str(where)
    if where.partition(":")[0] not in ("cpu", "cuda", "auto"):
        raise ParameterError(name, device_map, "'cpu', 'cuda', 'cuda:N' or 'auto'")
    return where.removesuffix(":0") if where.startswith("cpu") else where


def precision_of(dtype: Any) -> str | None:
    """A precision of `gptx.load`; None is that of the file.

    Raises:
        ParameterError: gptx does not compute in it.
    """
    if dtype is None:
        return None
    name = getattr(dtype, "__name__", None) or str(dtype)  # of a type of numpy, of one of torch
    name = name.removeprefix("torch.")
    if name == "auto":
        return None
    if name not in _PRECISIONS:
        allowed = ", ".join(map(repr, _PRECISIONS)) + " or 'auto'"
        raise ParameterError("dtype", dtype, allowed)
    return name


def load(path: Path, *, device: str, precision: str | None) -> Model:
    """The model of a path. Weights of a checkpoint become what the precision needs.

    Raises:
        ParameterError: a ``.gptx`` file whose weights do not have that precision.
    """
    if path.is_file() and modelfile.is_model_file(path):
        try:
            return gptx.loading.load(path, device=device, precision=precision)
        except ParameterError as error:
            if error.param != "precision":
                raise
            allowed = error.allowed + "; or convert it again with --dtype"
            raise ParameterError("dtype", precision, allowed) from None
    if precision in (None, "float32"):
        return gptx.loading.load(path, device=device)
    from gptx.convert import convert_in_memory

    source = convert_in_memory(path, dtype=str(precision).removesuffix("-fast"))
    return gptx.loading.load(source, device=device, precision=precision)
