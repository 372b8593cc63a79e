"""Hugging Face GPT-2 folders: ``config.json`` beside weights of safetensors or torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gptx.checkpoints.canonical import Checkpoint
from gptx.checkpoints.source import SourceTensor, read_json
from gptx.checkpoints.state_dict import (
    Inferred,
    assemble,
    canonical_sources,
    check_layers,
    infer,
    is_tied,
    shape_error,
)
from gptx.config import PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, GPTConfig
from gptx.errors import ConvertError, ParameterError, shown

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights in a Hugging Face folder, the first found is read."""

_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
}
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_MUST_BE_FALSY = (
    "add_cross_attention",
    "is_encoder_decoder",
    "pruned_heads",
    "quantization_config",
)
_SHARD = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.(safetensors|bin)")
_MAX_SHARDS = 4096
_SAMPLING: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: value >= 0,
    "top_k": lambda value: value >= 0,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: value > 0,
}

ReadTensors = Callable[[Path], Mapping[str, SourceTensor]]


def read_config(path: Path) -> dict[str, object]:
    """``config.json`` with GPT-2's own names for its fields.

    Raises:
        FileNotFoundError: there is none.
        ConvertError: it is not that of a GPT-2.
    """
    values = read_json(path)
    model_type = values.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise ConvertError(f"{path}: model_type: expected 'gpt2', got {shown(model_type)}")
    for alias, name in _ALIASES.items():
        if alias in values:
            value = values.pop(alias)
            if values.setdefault(name, value) != value:
                raise ConvertError(f"{path}: {alias} and {name} differ")
    for name in _MUST_BE_FALSY:
        if values.get(name):
            raise ConvertError(f"{path}: {name}: gptx runs models without it, got a value")
    return values


def shapes_of(values: Mapping[str, object], sources: Mapping[str, SourceTensor]) -> Inferred:
    """What the shapes say, after a look whether all the layers of ``config.json`` are there."""
    n_layer = values.get("n_layer")
    if type(n_layer) is int and n_layer > 0:
        check_layers(sources, n_layer)
    return infer(sources)


def config_of(
    values: Mapping[str, object], shapes: Inferred, path: Path, *, tied: bool
) -> GPTConfig:
    """The config of ``config.json``, checked against the shapes of the tensors.

    Fields that are absent have the defaults of transformers' ``GPT2Config``.

    Raises:
        ConvertError: a field is not honoured by gptx, or contradicts the tensors.
    """

    def whole(name: str, found: int, tensor: str) -> int:
        value = values.get(name)
        if value is None:
            value = 4 * shapes.n_embd if name == "n_inner" else found
        if type(value) is not int or value != found:
            message = f"{name}: expected {found}, as in tensor {tensor}, got {shown(value)}"
            raise ConvertError(f"{path}: {message}", tensor=tensor)
        return value

    def flag(name: str, default: bool) -> bool:
        value = values.get(name, default)
        if type(value) is not bool:
            raise ConvertError(f"{path}: {name}: expected true or false, got {shown(value)}")
        return value

    activation = values.get("activation_function", "gelu_new")
    if type(activation) is not str or activation not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise ConvertError(
            f"{path}: activation_function: expected one of {allowed}, got {shown(activation)}"
        )
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    flag("reorder_and_upcast_attn", False)  # attention is computed in float32 anyway
    labels, problem_type = head_of(values, shapes.n_labels, path)
    positions = "n_positions" if "n_positions" in values else "n_ctx"
    try:
        return GPTConfig(
            vocab_size=whole("vocab_size", shapes.vocab_size, "wte.weight"),
            block_size=whole(positions, shapes.block_size, "wpe.weight"),
            n_layer=whole("n_layer", shapes.n_layer, f"h.{shapes.n_layer - 1}.ln_1.weight"),
            n_head=_heads(values.get("n_head", 12), path),
            n_embd=whole("n_embd", shapes.n_embd, "wte.weight"),
            n_inner=whole("n_inner", shapes.n_inner, "h.0.mlp.c_fc.weight"),
            activation=_ACTIVATIONS[activation],
            layer_norm_epsilon=float(epsilon) if type(epsilon) is int else epsilon,  # type: ignore
            scale_attn_weights=flag("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=flag("scale_attn_by_inverse_layer_idx", False),
            tie_word_embeddings=tied,
            labels=labels,
            problem_type=problem_type,
        )
    except ParameterError as error:
        raise ConvertError(f"{path}: {error}") from None


def head_of(values: Mapping[str, object], n_labels: int, path: Path) -> tuple[tuple[str, ...], str]:
    """Labels and problem type of a classification head with so many outputs, 0 for none.

    ``id2label`` of ``config.json``, else LABEL_0 and so on; ``problem_type``, else regression for
    one output and one of the labels for several, as transformers decides.

    Raises:
        ConvertError: they do not fit the head.
    """
    if n_labels == 0:
        return (), ""
    ids = [str(i) for i in range(n_labels)]
    names = values.get("id2label")
    if names is None:
        names = {i: f"LABEL_{i}" for i in ids}
    if type(names) is not dict or sorted(names) != sorted(ids):
        message = f"id2label: expected the ids 0 to {n_labels - 1}, as in tensor score.weight"
        raise ConvertError(f"{path}: {message}, got {shown(names)}", tensor="score.weight")
    problem = values.get("problem_type")
    if problem is None:
        problem = REGRESSION if n_labels == 1 else SINGLE_LABEL
    if type(problem) is not str or problem not in PROBLEM_TYPES:
        allowed = ", ".join(PROBLEM_TYPES)
        raise ConvertError(f"{path}: problem_type: expected one of {allowed}, got {shown(problem)}")
    return tuple(names[i] for i in ids), problem


def _heads(value: object, path: Path) -> int:
    if type(value) is not int:
        raise ConvertError(f"{path}: n_head: expected an integer, got {shown(value)}")
    return value


def read_huggingface(folder: Path, read_tensors: ReadTensors) -> Checkpoint:
    """A Hugging Face GPT-2 folder. ``read_tensors`` reads one file of weights by its content.

    Raises:
        ConvertError, ModelFileError, UnsafeCheckpointError: as `gptx.checkpoints.read_checkpoint`.
    """
    config_path = folder / "config.json"
    values = read_config(config_path)
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise ConvertError(f"{folder}: expected one of {', '.join(WEIGHTS)}, found none")
    tensors = read_weights(weights, read_tensors)
    sources = canonical_sources(tensors)
    shapes = shapes_of(values, sources)
    if not shapes.conv1d:
        raise shape_error(sources["h.0.attn.c_attn.weight"], (shapes.n_embd, 3 * shapes.n_embd))
    untied = values.get("tie_word_embeddings", True) is False
    if "lm_head.weight" not in sources and untied and not shapes.n_labels:
        message = "tensor lm_head.weight: missing (config.json says it is not tied)"
        raise ConvertError(message, tensor="lm_head.weight")
    tied = is_tied(sources)
    config = config_of(values, shapes, config_path, tied=tied)
    notes = []
    if not tied and values.get("tie_word_embeddings", True) is True:
        notes.append("lm_head differs from wte: kept apart, although config.json ties them")
    if "lm_head.weight" not in sources and untied:
        notes.append("no lm_head beside the classification head: the embedding stands for it")
    ids = ("bos_token_id", "eos_token_id", *(["pad_token_id"] if config.labels else []))
    generation = generation_defaults(folder, values, config.vocab_size, notes, ids)
    return Checkpoint(
        config=config,
        # transformers' GPT-2 is made of Conv1D and always has biases.
        tensors=assemble(sources, config, conv1d=True, bias=True),
        tokenizer=None,
        generation=generation,
        source=f"Hugging Face GPT-2, {weights.name}, {describe_data(tensors)}",
        license=_license(folder / "README.md"),
        notes=notes,
    )


def describe_data(tensors: Mapping[str, SourceTensor]) -> str:
    """Size and type of the data, for people: ``548 MB float32``."""
    size = sum({tensor.place: tensor.nbytes for tensor in tensors.values()}.values())
    types: dict[str, int] = {}
    for tensor in tensors.values():
        types[tensor.dtype] = types.get(tensor.dtype, 0) + tensor.nbytes
    main = max(types, key=types.__getitem__, default="nothing")
    unit, text = next(
        (u, t) for u, t in ((10**6, "MB"), (10**3, "kB"), (1, "B")) if size >= u or u == 1
    )
    return f"{size / unit:.0f} {text} {main}"


def read_weights(path: Path, read_tensors: ReadTensors) -> dict[str, SourceTensor]:
    """The tensors of one file, or of all the shards that an index names.

    Raises:
        ConvertError: the index and the shards do not agree, or a shard is missing.
    """
    if not path.name.endswith(".json"):
        return dict(read_tensors(path))
    weight_map = read_json(path).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise ConvertError(f"{path}: weight_map: expected tensor names with file names")
    for name, shard in weight_map.items():
        # A basename: a shard cannot point out of its folder.
        if type(shard) is not str or not _SHARD.fullmatch(shard):
            message = f"{path}: weight_map: expected the plain name of a shard, got {shown(shard)}"
            raise ConvertError(message, tensor=name)
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise ConvertError(f"{path}: expected at most {_MAX_SHARDS} shards, got {len(shards)}")
    result: dict[str, SourceTensor] = {}
    for shard in shards:
        if not (path.parent / shard).exists():
            raise ConvertError(
                f"{path.parent / shard}: missing; {path.name} names {len(shards)} shards"
            )
        for name, tensor in read_tensors(path.parent / shard).items():
            if weight_map.get(name) != shard:
                message = f"tensor {name[:200]!r}: {shard} has it, {path.name} does not say so"
                raise ConvertError(message, tensor=name)
            result[name] = replace(tensor, name=name)
    for name, shard in weight_map.items():
        if name not in result:
            raise ConvertError(f"tensor {name[:200]!r}: not in its shard {shard}", tensor=name)
    return result


def generation_defaults(
    folder: Path,
    config: Mapping[str, object],
    vocab_size: int,
    notes: list[str],
    ids_of: Sequence[str] = ("bos_token_id", "eos_token_id"),
) -> dict[str, object]:
    """Known keys of ``generation_config.json``, else of ``config.json``; odd values are noted."""
    path = folder / "generation_config.json"
    values = {**config, **(read_json(path) if path.exists() else {})}
    result: dict[str, object] = {}
    for name in ids_of:
        value = values.get(name)
        ids = value if type(value) is list else [value]
        if value is None:
            continue
        if not ids or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
            notes.append(f"{name} {shown(value)} left out: not below {vocab_size}")
        else:
            result[name] = ids[0] if len(ids) == 1 else ids
    if values.get("do_sample") is True:
        for name, allowed in _SAMPLING.items():
            value = values.get(name)
            if value is None:
                continue
            number = type(value) in (int, float) and math.isfinite(value)  # type: ignore
            if number and (name != "top_k" or type(value) is int) and allowed(value):  # type: ignore
                result[name] = value
            else:
                notes.append(f"{name} {shown(value)} left out: outside of its range")
    return result


def _license(card: Path) -> str:
    """The ``license:`` line of a model card's front matter, or ""."""
    if not card.is_file():
        return ""
    with card.open("rb") as file:
        head = file.read(16_384).decode("utf-8", "replace")
    front = re.match(r"---\r?\n(.*?)\r?\n---", head, re.DOTALL)
    found = re.search(r"^license:\s*([A-Za-z0-9.\-_]{1,80})\s*$", front[1], re.M) if front else None
    return found[1] if found else ""
