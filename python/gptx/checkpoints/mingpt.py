"""minGPT as of 2020 (https://github.com/karpathy/minGPT): other names, q, k and v apart.

Later versions of minGPT use the names of GPT-2 and need nothing of this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gptx.checkpoints.source import SourceTensor
from gptx.errors import ConvertError

_PROJECTIONS = ("query", "key", "value")
_RENAMED = {
    "ln1": "ln_1",
    "ln2": "ln_2",
    "attn.proj": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
_IN_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,4})\.(.+)\.(weight|bias)")
_MASK = re.compile(r"blocks\.(0|[1-9][0-9]{0,4})\.attn\.mask")


def is_old_mingpt(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether these are the names of minGPT before 2022."""
    return "tok_emb.weight" in tensors and "pos_emb" in tensors


def modern_names(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under GPT-2's names; query, key and value concatenated in this order.

    Raises:
        ConvertError: one of the three projections is missing. Unknown names stay as they are.
    """
    result: dict[str, SourceTensor] = {}
    parts: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in tensors.items():
        block = _IN_BLOCK.fullmatch(name)
        if name == "pos_emb":
            result["wpe.weight"] = _without_batch(tensor)
        elif name in ("tok_emb.weight", "head.weight"):
            result["wte.weight" if name == "tok_emb.weight" else "lm_head.weight"] = tensor
        elif mask := _MASK.fullmatch(name):
            result[f"h.{mask[1]}.attn.bias"] = tensor
        elif block and block[2] in _RENAMED:
            result[f"h.{block[1]}.{_RENAMED[block[2]]}.{block[3]}"] = tensor
        elif block and block[2].removeprefix("attn.") in _PROJECTIONS:
            target = f"h.{block[1]}.attn.c_attn.{block[3]}"
            parts.setdefault(target, {})[block[2].removeprefix("attn.")] = tensor
        else:
            result[name] = tensor
    for target, found in parts.items():
        result[target] = _concatenated(target, found)
    return result


def _without_batch(tensor: SourceTensor) -> SourceTensor:
    """``pos_emb`` is ``[1, block_size, n_embd]``."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        expected = "[1, block_size, n_embd]"
        message = f"tensor {tensor.name}: expected shape {expected}, got {list(tensor.shape)}"
        raise ConvertError(message, tensor=tensor.name)
    return replace(tensor, shape=tensor.shape[1:], load=lambda: tensor.load()[0])


def _concatenated(target: str, found: Mapping[str, SourceTensor]) -> SourceTensor:
    prefix = target.replace("h.", "blocks.", 1).replace("c_attn", "{}")
    for part in _PROJECTIONS:
        if part not in found:
            name = prefix.format(part)
            raise ConvertError(f"tensor {name}: missing", tensor=name)
    tensors = [found[part] for part in _PROJECTIONS]
    first = tensors[0]
    for tensor in tensors:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype) or not tensor.shape:
            expected = f"{first.dtype} {list(first.shape)}"
            message = f"expected {expected}, got {tensor.dtype} {list(tensor.shape)}"
            raise ConvertError(f"tensor {tensor.name}: {message}", tensor=tensor.name)
    return SourceTensor(
        prefix.format("{query,key,value}"),
        (3 * first.shape[0], *first.shape[1:]),
        first.dtype,
        tuple(tensor.place for tensor in tensors),
        lambda: np.concatenate([tensor.load() for tensor in tensors]),
    )
