"""From the tensors of a state_dict to the canonical ones: names, orientation, ties, completeness.

Every source tensor is consumed exactly once and every canonical tensor produced, or the reader
says which tensor is at fault. GPT-2's Conv1D stores ``[in, out]``, torch's Linear ``[out, in]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gptx.checkpoints.canonical import LazyTensors
from gptx.checkpoints.source import SourceTensor
from gptx.config import GPTConfig
from gptx.errors import ConvertError
from gptx.modelfile import CLASS_HEAD, canonical_shapes

_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DataParallel
_LAYER = re.compile(r"h\.(0|[1-9][0-9]{0,4})\.(.+)")
_IN_LAYER = {
    f"{module}.{kind}"
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
}
_OUTSIDE = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight", CLASS_HEAD}
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_FOREIGN = (
    ("gate", "a gated MLP"),
    ("up_proj", "a gated MLP"),
    ("rotary", "rotary positions"),
    ("inv_freq", "rotary positions"),
    ("q_proj", "separate query, key and value projections"),
    ("query", "separate query, key and value projections"),
    ("crossattention", "cross-attention"),
    ("ln_cross_attn", "cross-attention"),
    ("lora_", "a LoRA adapter: merge it into its model first"),
    ("score", "another classification head"),
    ("classifier", "another classification head"),
    ("tokens_embed", "GPT-1"),
    ("norm", "another normalisation"),
)


def canonical_sources(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Source tensors by canonical name, without the mask buffers of old checkpoints.

    Raises:
        ConvertError: two tensors have the same canonical name, or one is no part of a GPT-2.
    """
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        short = _strip_prefixes(name)
        layer = _LAYER.fullmatch(short)
        if layer and layer[2] in ("attn.bias", "attn.masked_bias"):
            _check_mask(tensor, layer[2])
            continue
        if short not in _OUTSIDE and not (layer and layer[2] in _IN_LAYER):
            raise _unknown(name)
        if short in result:
            both = f"{result[short].name} and {name}"
            raise ConvertError(f"tensors {both}: expected one {short}, got two", tensor=name)
        result[short] = tensor
    return result


def _strip_prefixes(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name.removeprefix("transformer.")


def _unknown(name: str) -> ConvertError:
    hint = next((what for part, what in _FOREIGN if part in name.lower()), "")
    text = f"tensor {name[:200]!r}: not part of a GPT-2"
    return ConvertError(f"{text} ({hint})" if hint else text, tensor=name)


def _check_mask(tensor: SourceTensor, kind: str) -> None:
    """A causal mask ``[1, 1, n, n]`` says nothing new; any other mask is another model."""
    if kind == "attn.masked_bias":
        fine = tensor.shape in ((), (1,))
    else:
        fine = len(tensor.shape) == 4 and tensor.shape == (1, 1, *tensor.shape[2:3] * 2)
        fine = fine and tensor.shape[2] <= 65_536
    if fine and kind == "attn.bias":
        mask = tensor.load()[0, 0] != 0
        # Row by row: a mask of the full context would need as much memory again.
        fine = all(row[: i + 1].all() and not row[i + 1 :].any() for i, row in enumerate(mask))
    if not fine:
        message = f"tensor {tensor.name}: expected a causal mask, got {tensor.dtype}"
        raise ConvertError(f"{message} {list(tensor.shape)}", tensor=tensor.name)


@dataclass(frozen=True)
class Inferred:
    """What the shapes alone say. ``conv1d``: matrices are ``[in, out]``; ``n_labels``: outputs of
    the classification head, 0 where there is none.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_embd: int
    n_inner: int
    conv1d: bool
    bias: bool
    n_labels: int


def infer(sources: Mapping[str, SourceTensor]) -> Inferred:
    """Reads the hyperparameters off the shapes of canonical sources.

    Raises:
        ConvertError: a tensor that is needed is missing, or its shape is not that of a GPT-2.
    """
    vocab_size, n_embd = _matrix(sources, "wte.weight")
    block_size, width = _matrix(sources, "wpe.weight")
    if width != n_embd:
        raise shape_error(sources["wpe.weight"], (block_size, n_embd))
    n_layer = len({m[1] for m in map(_LAYER.fullmatch, sources) if m})
    check_layers(sources, n_layer)
    c_attn = _matrix(sources, "h.0.attn.c_attn.weight")
    if c_attn not in ((n_embd, 3 * n_embd), (3 * n_embd, n_embd)):
        raise shape_error(sources["h.0.attn.c_attn.weight"], (3 * n_embd, n_embd))
    conv1d = c_attn == (n_embd, 3 * n_embd)
    n_inner = _matrix(sources, "h.0.mlp.c_fc.weight")[1 if conv1d else 0]
    bias = any(name.endswith(".bias") for name in sources)
    n_labels, width = _matrix(sources, CLASS_HEAD) if CLASS_HEAD in sources else (0, n_embd)
    if width != n_embd:
        raise shape_error(sources[CLASS_HEAD], (n_labels, n_embd))
    return Inferred(vocab_size, block_size, n_layer, n_embd, n_inner, conv1d, bias, n_labels)


def check_layers(sources: Mapping[str, SourceTensor], n_layer: int) -> None:
    """The layers are 0 to ``n_layer - 1``, none missing and none more."""
    layers = {int(m[1]): sources[m[0]].name for m in map(_LAYER.fullmatch, sources) if m}
    for layer in range(min(n_layer, len(layers) + 1)):
        if layer not in layers:
            name = f"h.{layer}.ln_1.weight"
            message = f"tensor {name}: missing (the model has {n_layer} layers)"
            raise ConvertError(message, tensor=name)
    for layer, name in layers.items():
        if layer >= n_layer:
            message = f"tensor {name}: not in a model of {n_layer} layers"
            raise ConvertError(message, tensor=name)


def _matrix(sources: Mapping[str, SourceTensor], name: str) -> tuple[int, int]:
    if name not in sources:
        raise ConvertError(f"tensor {name}: missing", tensor=name)
    shape = sources[name].shape
    if len(shape) != 2 or 0 in shape:
        expected = "a matrix that is not empty"
        message = f"tensor {sources[name].name}: expected {expected}, got {list(shape)}"
        raise ConvertError(message, tensor=sources[name].name)
    return shape[0], shape[1]


def shape_error(source: SourceTensor, expected: Iterable[int]) -> ConvertError:
    """The error for a tensor of another shape than ``expected``."""
    message = f"tensor {source.name}: expected shape {list(expected)}, got {list(source.shape)}"
    return ConvertError(message, tensor=source.name)


def is_tied(sources: Mapping[str, SourceTensor]) -> bool:
    """Whether ``lm_head`` is absent, or the same numbers as ``wte``. Reads both if it must."""
    head, wte = sources.get("lm_head.weight"), sources["wte.weight"]
    if head is None or head.place == wte.place:
        return True
    if head.shape != wte.shape:
        raise shape_error(head, wte.shape)
    return bool(np.array_equal(head.read(), wte.read()))


def assemble(
    sources: Mapping[str, SourceTensor], config: GPTConfig, *, conv1d: bool, bias: bool
) -> LazyTensors:
    """Canonical tensors of ``config`` out of canonical sources, complete in both directions.

    Args:
        sources: from `canonical_sources`; a tied ``lm_head.weight`` among them is not read.
        config: as the checkpoint has it, before the vocabulary is trimmed.
        conv1d: the four matrices of a layer are ``[in, out]``.
        bias: False makes zeros of all biases.

    Raises:
        ConvertError: a tensor is missing, superfluous, or of another shape.
    """
    targets = canonical_shapes(config)
    for name, source in sources.items():
        if name not in targets and not (name == "lm_head.weight" and config.tie_word_embeddings):
            message = f"tensor {source.name}: not part of this model"
            raise ConvertError(message, tensor=source.name)
    missing = [n for n in targets if n not in sources and (bias or not n.endswith(".bias"))]
    if missing:
        count = f"{len(missing)} of {len(targets)} tensors missing"
        raise ConvertError(f"tensor {missing[0]}: missing ({count})", tensor=missing[0])
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for name, shape in targets.items():
        transpose = conv1d and name.partition(".")[2].partition(".")[2] in _CONV1D
        if name in sources:
            expected = shape[::-1] if transpose else shape
            if sources[name].shape != expected:
                raise shape_error(sources[name], expected)
            makers[name] = _maker(sources[name], transpose)
        else:
            makers[name] = _zeros(shape)
    return LazyTensors(makers)


def _maker(source: SourceTensor, transpose: bool) -> Callable[[], np.ndarray]:
    if not transpose:
        return source.read
    return lambda: np.ascontiguousarray(source.read().T)


def _zeros(shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(shape, np.float32)


def trim_vocabulary(tensors: Mapping[str, np.ndarray], vocab_size: int) -> LazyTensors:
    """The same tensors with only the first ``vocab_size`` rows of the embedding and the head."""

    def trimmed(name: str) -> Callable[[], np.ndarray]:
        if name in ("wte.weight", "lm_head.weight"):
            return lambda: tensors[name][:vocab_size]
        return lambda: tensors[name]

    return LazyTensors({name: trimmed(name) for name in tensors})
