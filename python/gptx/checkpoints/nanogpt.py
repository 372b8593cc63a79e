"""nanoGPT's ``ckpt.pt`` (https://github.com/karpathy/nanoGPT) and bare state_dicts.

nanoGPT's matrices are Linear, its GELU is the exact erf form since June 2023 (the tanh form before;
the file does not say), its vocabulary is padded to a multiple of 64, and a model trained on
characters has its table in a ``meta.pkl``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptx.checkpoints.canonical import Checkpoint
from gptx.checkpoints.huggingface import (
    config_of,
    describe_data,
    head_of,
    read_config,
    shapes_of,
)
from gptx.checkpoints.mingpt import is_old_mingpt, modern_names
from gptx.checkpoints.pickle_reader import describe
from gptx.checkpoints.source import SourceTensor
from gptx.checkpoints.state_dict import (
    Inferred,
    assemble,
    canonical_sources,
    infer,
    is_tied,
)
from gptx.checkpoints.torch_file import read_plain_pickle
from gptx.config import GPTConfig
from gptx.errors import ConvertError, ParameterError

_STATE_KEYS = ("model", "state_dict", "model_state_dict")
_DATASET = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,200}")


@dataclass(frozen=True)
class TorchDict:
    """A dict that ``torch.save`` wrote: the state_dict inside, and the rest around it."""

    tensors: dict[str, SourceTensor]
    around: Mapping[object, object]


def state_dict_of(value: object, path: Path) -> TorchDict:
    """Finds the state_dict in what a torch file holds.

    Raises:
        ConvertError: there is none, or one of its values is not a tensor.
    """
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: expected a dict of tensors, got {describe(value)}")
    around: Mapping[object, object] = {}
    for key in _STATE_KEYS:
        inner = value.get(key)
        if isinstance(inner, dict):
            around, value = value, inner
            break
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in value.items():
        if type(name) is not str or type(tensor) is not SourceTensor:
            message = f"{path}: {describe(name)}: expected a tensor, got {describe(tensor)}"
            raise ConvertError(message, tensor=str(name)[:200])
        tensors[name] = replace(tensor, name=name)
    if not tensors:
        raise ConvertError(f"{path}: expected a dict of tensors, got an empty one")
    return TorchDict(tensors, around)


def read_nanogpt(path: Path, content: TorchDict) -> Checkpoint:
    """A nanoGPT checkpoint: ``content.around`` has ``model_args``.

    Raises:
        ConvertError: a tensor or an argument is not that of a nanoGPT.
    """
    sources = canonical_sources(content.tensors)
    shapes, tied = infer(sources), is_tied(sources)
    args = content.around["model_args"]
    if not isinstance(args, dict):
        raise ConvertError(f"{path}: model_args: expected a dict, got {describe(args)}")
    config = _config_of_args(args, shapes, path, tied)
    bias = args.get("bias", shapes.bias)
    if bias is not shapes.bias:
        found = "has biases" if shapes.bias else "has none"
        message = f"model_args bias={describe(bias)}, but the checkpoint {found}"
        raise ConvertError(f"{path}: {message}")
    notes = ["activation gelu (erf), nanoGPT's since June 2023; older: --activation gelu_new"]
    if not shapes.bias:
        notes.append("no biases: zeros")
    return Checkpoint(
        config=config,
        tensors=assemble(sources, config, conv1d=shapes.conv1d, bias=shapes.bias),
        tokenizer=None,
        generation={},
        source=f"nanoGPT, {path.name}{_progress(content.around)}, {describe_data(content.tensors)}",
        notes=notes,
    )


def _config_of_args(
    args: Mapping[object, object], shapes: Inferred, path: Path, tied: bool
) -> GPTConfig:
    found = {
        "vocab_size": shapes.vocab_size,
        "block_size": shapes.block_size,
        "n_layer": shapes.n_layer,
        "n_embd": shapes.n_embd,
    }
    for name, size in found.items():
        value = args.get(name)
        if value is not None and (type(value) is not int or value != size):
            message = f"expected {size} as in the tensors, got {describe(value)}"
            raise ConvertError(f"{path}: model_args {name}: {message}")
    n_head = args.get("n_head")
    if type(n_head) is not int:
        message = f"expected an integer, got {describe(n_head)}"
        raise ConvertError(f"{path}: model_args n_head: {message}")
    try:
        return GPTConfig(
            vocab_size=shapes.vocab_size,
            block_size=shapes.block_size,
            n_layer=shapes.n_layer,
            n_embd=shapes.n_embd,
            n_head=n_head,
            n_inner=shapes.n_inner,
            activation="gelu",
            tie_word_embeddings=tied,
        )
    except ParameterError as error:
        raise ConvertError(f"{path}: model_args: {error}") from None


def _progress(around: Mapping[object, object]) -> str:
    """``, iteration 5000, val loss 1.47``, as far as the checkpoint says so."""
    text = ""
    if type(around.get("iter_num")) is int:
        text += f", iteration {around['iter_num']}"
    loss = around.get("best_val_loss")
    if type(loss) is SourceTensor and loss.shape == () and loss.dtype == "float32":
        loss = float(loss.load())
    if type(loss) is float:
        text += f", val loss {loss:.4g}"
    return text


def read_character_table(path: Path, around: Mapping[object, object]) -> dict[str, int] | None:
    """``stoi`` of the ``meta.pkl`` beside the checkpoint, or in nanoGPT's ``data/<dataset>``.

    Raises:
        UnsafeCheckpointError, ModelFileError: the file is not a pickle of plain values.
        ConvertError: it holds no table of characters.
    """
    folders = [path.parent]
    config = around.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if type(dataset) is str and _DATASET.fullmatch(dataset):
        here = path.resolve().parent
        folders += [here / "data" / dataset, here.parent / "data" / dataset]
    for folder in folders:
        meta = folder / "meta.pkl"
        if meta.is_file():
            return character_table(meta)
    return None


def character_table(meta: Path) -> dict[str, int]:
    """``stoi`` of a nanoGPT ``meta.pkl``: character -> id."""
    value = read_plain_pickle(meta)
    stoi = value.get("stoi") if type(value) is dict else None
    if type(stoi) is not dict or not stoi:
        raise ConvertError(f"{meta}: stoi: expected a dict of characters, got {describe(stoi)}")
    for character, number in stoi.items():
        if type(character) is not str or len(character) != 1 or type(number) is not int:
            pair = f"{describe(character)}: {describe(number)}"
            raise ConvertError(f"{meta}: stoi: expected one character and its id, got {pair}")
    if sorted(stoi.values()) != list(range(len(stoi))):
        raise ConvertError(f"{meta}: stoi: expected the ids 0 to {len(stoi) - 1}, each once")
    return stoi


def read_bare(path: Path, tensors: Mapping[str, SourceTensor], n_head: int | None) -> Checkpoint:
    """A state_dict without hyperparameters; a ``config.json`` beside it is used.

    Args:
        path: of the file, for its folder and for messages.
        tensors: the state_dict.
        n_head: number of heads, where neither ``config.json`` nor a head size of 64 says it.

    Raises:
        ConvertError: the tensors do not make a GPT-2, or ``n_head`` cannot be guessed.
    """
    notes: list[str] = []
    old = is_old_mingpt(tensors)
    data = describe_data(tensors)
    if old:
        tensors = modern_names(tensors)
    sources = canonical_sources(tensors)
    config_path = path.parent / "config.json"
    values = read_config(config_path) if config_path.is_file() else None
    shapes, tied = shapes_of(values or {}, sources), is_tied(sources)
    if values is not None:
        if n_head is not None:
            values.setdefault("n_head", n_head)
        config = config_of(values, shapes, config_path, tied=tied)
        notes.append("hyperparameters from config.json")
    else:
        config = _guessed_config(path, shapes, n_head, notes, tied=tied, old=old)
    if not shapes.bias:
        notes.append("no biases: zeros")
    layout = "Conv1D" if shapes.conv1d else "Linear"
    kind = "minGPT (2020) state_dict" if old else f"state_dict ({layout})"
    return Checkpoint(
        config=config,
        tensors=assemble(sources, config, conv1d=shapes.conv1d, bias=shapes.bias),
        tokenizer=None,
        generation={},
        source=f"{kind}, {path.name}, {data}",
        notes=notes,
    )


def _guessed_config(
    path: Path, shapes: Inferred, n_head: int | None, notes: list[str], *, tied: bool, old: bool
) -> GPTConfig:
    if n_head is None:
        if shapes.n_embd % 64:
            wanted = f"pass n_head (--n-head), a divisor of n_embd = {shapes.n_embd}"
            raise ConvertError(f"{path}: the number of heads is not in the file; {wanted}")
        n_head = shapes.n_embd // 64
        notes.append(f"n_head {n_head}, for the usual head size of 64; else: --n-head")
    activation = "gelu" if old else "gelu_new"
    notes.append(f"activation {activation} assumed, as the file does not say; else: --activation")
    labels, problem_type = head_of({}, shapes.n_labels, path)
    return GPTConfig(
        vocab_size=shapes.vocab_size,
        block_size=shapes.block_size,
        n_layer=shapes.n_layer,
        n_head=n_head,
        n_embd=shapes.n_embd,
        n_inner=shapes.n_inner,
        activation=activation,
        tie_word_embeddings=tied,
        labels=labels,
        problem_type=problem_type,
    )
