"""Foreign checkpoints, read without torch and without executing anything in them.

`read_checkpoint` finds the format by the content of the files. Each format has one module; all give
a `Checkpoint`: a config, and tensors under canonical names that are read one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptx.checkpoints.canonical import Checkpoint
from gptx.checkpoints.huggingface import WEIGHTS, read_huggingface, read_weights
from gptx.checkpoints.nanogpt import (
    TorchDict,
    character_table,
    read_bare,
    read_character_table,
    read_nanogpt,
    state_dict_of,
)
from gptx.checkpoints.safetensors import looks_like_safetensors, read_safetensors
from gptx.checkpoints.source import SourceFile, SourceTensor
from gptx.checkpoints.state_dict import trim_vocabulary
from gptx.checkpoints.torch_file import (
    is_legacy_torch,
    is_torch_zip,
    read_plain_pickle,
    read_torch_file,
)
from gptx.config import ACTIVATIONS
from gptx.errors import ConvertError, ParameterError
from gptx.modelfile import canonical_shapes as canonical_names

if TYPE_CHECKING:
    from gptx.tokenizer import TokenizerSpec

__all__ = [
    "GPT2_VOCAB",
    "NO_TOKENIZER",
    "Checkpoint",
    "canonical_names",
    "read_checkpoint",
]

GPT2_VOCAB = 50_257
NO_TOKENIZER = "none"
"""As ``tokenizer``: do not look for one. A folder of this name is written ``./none``."""

_MAX_PADDING = 1024  # vocabularies are padded to multiples of 64, 128, ..., 1024
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_FOREIGN_MAGIC = {
    b"GGUF": "a GGUF file: convert the checkpoint it was made from",
    b"\x89HDF": "an HDF5 file of Keras: convert the model.safetensors of the same model",
    b"vers": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<htm": "a web page: download the file again",
    b"<!DO": "a web page: download the file again",
}


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | TokenizerSpec | None = None,
    activation: str | None = None,
    n_head: int | None = None,
) -> Checkpoint:
    """Understands a foreign checkpoint. Tensors are read later, one at a time.

    Args:
        path: a Hugging Face GPT-2 folder, a folder with one checkpoint, a nanoGPT ``ckpt.pt``, a
            state_dict in a torch or safetensors file, or the index of a sharded one.
        tokenizer: a file or a folder of a tokenizer, a spec, or ``NO_TOKENIZER``; default: what
            lies beside the checkpoint. The vocabulary is trimmed to it; without one, a GPT-2
            vocabulary that was padded is trimmed to its 50,257 tokens.
        activation: overrides what the checkpoint says or its format implies.
        n_head: for a bare state_dict, which does not say it.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ParameterError: ``activation`` or ``n_head`` is not a valid value.
        ConvertError: not a checkpoint that gptx reads, or its tensors do not make a GPT-2.
        ModelFileError: a file is damaged.
        UnsafeCheckpointError: a pickle asks for more than tensors and plain values.
        TokenizeError: the tokenizer's files are damaged.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ParameterError("activation", activation, "one of " + ", ".join(ACTIVATIONS))
    if n_head is not None and (type(n_head) is not int or n_head < 1):
        raise ParameterError("n_head", n_head, "a positive integer")
    path = Path(path)
    own = tokenizer is None
    read = _read_folder if path.is_dir() else _read_file
    checkpoint = read(path, n_head, own_tokenizer=own)
    # A file name may hold what is no text.
    checkpoint.source = "".join(c if c.isprintable() else "?" for c in checkpoint.source)
    if n_head is not None and checkpoint.config.n_head != n_head:
        found = checkpoint.config.n_head
        raise ConvertError(f"{path}: n_head: the checkpoint says {found}, not {n_head}")
    if activation is not None:
        checkpoint.config = replace(checkpoint.config, activation=activation)
        checkpoint.notes = [n for n in checkpoint.notes if not n.startswith("activation ")]
        checkpoint.notes.append(f"activation {activation}, as asked")
    folder = path if path.is_dir() else path.parent
    if tokenizer is not None and tokenizer != NO_TOKENIZER:
        checkpoint.tokenizer = _given_tokenizer(tokenizer)
    elif own and checkpoint.tokenizer is None:
        checkpoint.tokenizer = _tokenizer_beside(folder)
    _fit_vocabulary(checkpoint)
    return checkpoint


def read_tensors(path: Path) -> Mapping[str, SourceTensor]:
    """The tensors of one file of weights, its format found by content."""
    return _read_dict(path).tensors


def _read_folder(folder: Path, n_head: int | None, *, own_tokenizer: bool) -> Checkpoint:
    if (folder / "config.json").exists() and any((folder / name).exists() for name in WEIGHTS):
        return read_huggingface(folder, read_tensors)
    files = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES and p.is_file())
    if len(files) == 1:
        return _read_file(files[0], n_head, own_tokenizer=own_tokenizer)
    if files:
        names = ", ".join(p.name for p in files[:5])
        raise ConvertError(f"{folder}: expected one checkpoint, got {names}; name the file")
    expected = f"config.json with one of {', '.join(WEIGHTS)}, or a checkpoint file"
    raise ConvertError(f"{folder}: expected {expected}, found none")


def _read_file(path: Path, n_head: int | None, *, own_tokenizer: bool) -> Checkpoint:
    if path.name.endswith(".index.json"):
        return read_bare(path, read_weights(path, read_tensors), n_head)
    content = _read_dict(path)
    if "model_args" not in content.around:
        checkpoint = read_bare(path, content.tensors, n_head)
    else:
        checkpoint = read_nanogpt(path, content)
    table = read_character_table(path, content.around) if own_tokenizer else None
    if table is not None:
        from gptx.checkpoints.tokenizer_files import from_chars

        checkpoint.tokenizer = from_chars(table)
        checkpoint.notes.append(f"tokenizer of {len(table)} characters from meta.pkl")
    return checkpoint


def _read_dict(path: Path) -> TorchDict:
    file = SourceFile(path)
    if file.size == 0:
        raise ConvertError(f"{path}: the file is empty")
    if looks_like_safetensors(file):
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") == "gptx":
            raise ConvertError(f"{path}: already a .gptx file; load it with gptx.load")
        return TorchDict(tensors, {})
    if is_torch_zip(file):
        return state_dict_of(read_torch_file(path), path)
    head = file.read(0, min(4, file.size), "magic").tobytes()
    if is_legacy_torch(file):
        remedy = 'save it again with a newer torch: torch.save(torch.load(FILE), "new.pt")'
        raise ConvertError(
            f"{path}: in the format of torch before 1.6, which is not read; {remedy}"
        )
    if head[:1] == b"\x80":
        read_plain_pickle(path)  # names what the pickle asks for, if it is more than data
        raise ConvertError(f"{path}: a pickle without tensors, not a checkpoint")
    what = _FOREIGN_MAGIC.get(head, "expected a safetensors file or one written by torch.save")
    raise ConvertError(f"{path}: not a checkpoint that gptx reads: {what}")


def _given_tokenizer(tokenizer: str | os.PathLike[str] | TokenizerSpec) -> TokenizerSpec:
    from gptx.checkpoints.tokenizer_files import from_chars, from_file
    from gptx.tokenizer import TokenizerSpec

    if isinstance(tokenizer, TokenizerSpec):
        return tokenizer
    path = Path(tokenizer)
    return from_chars(character_table(path)) if path.suffix == ".pkl" else from_file(path)


def _tokenizer_beside(folder: Path) -> TokenizerSpec | None:
    from gptx.checkpoints.tokenizer_files import from_folder

    return from_folder(folder)


def _fit_vocabulary(checkpoint: Checkpoint) -> None:
    """Trims padding rows of the embedding, or special tokens that the model does not have."""
    config, spec = checkpoint.config, checkpoint.tokenizer
    if spec is None:
        wanted = (
            GPT2_VOCAB if 0 < config.vocab_size - GPT2_VOCAB < _MAX_PADDING else config.vocab_size
        )
    else:
        if spec.n_vocab > config.vocab_size:
            spec = checkpoint.tokenizer = _without_unused(spec, config.vocab_size, checkpoint.notes)
        wanted = spec.n_vocab
        if config.vocab_size - wanted >= _MAX_PADDING:
            message = f"expected about {config.vocab_size} tokens, got {wanted}"
            raise ConvertError(f"tokenizer: {message}; pass the one of this model (--tokenizer)")
    if wanted < config.vocab_size:
        checkpoint.notes.append(f"vocabulary trimmed from {config.vocab_size} to {wanted}")
        checkpoint.tensors = trim_vocabulary(checkpoint.tensors, wanted)
        checkpoint.config = replace(config, vocab_size=wanted)
    for name, value in list(checkpoint.generation.items()):
        ids = value if type(value) is list else [value]
        if name.endswith("_token_id") and any(i >= wanted for i in ids):  # type: ignore[operator]
            checkpoint.notes.append(f"{name} {value} left out: not below {wanted}")
            del checkpoint.generation[name]


def _without_unused(spec: TokenizerSpec, vocab_size: int, notes: list[str]) -> TokenizerSpec:
    """Drops named tokens past the model's vocabulary, which the model never learnt."""
    if any(token is not None for token in spec.tokens[vocab_size:]):
        message = f"expected at most {vocab_size} tokens, got {spec.n_vocab}"
        raise ConvertError(f"tokenizer: {message}; pass the one of this model (--tokenizer)")
    special = {text: i for text, i in spec.special_tokens.items() if i < vocab_size}
    added = {text: i for text, i in spec.added_tokens.items() if i < vocab_size}
    unused = {*spec.special_tokens, *spec.added_tokens} - {*special, *added}
    shown = ", ".join(sorted(map(repr, unused)))[:200]
    notes.append(f"added tokens past the vocabulary left out: {shown}")
    return replace(
        spec, tokens=spec.tokens[:vocab_size], special_tokens=special, added_tokens=added
    )
