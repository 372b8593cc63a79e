"""Where a run begins: a new model with a tokenizer learnt from the data, or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptx import modelfile
from gptx.checkpoints import GPT2_VOCAB, canonical_names, read_checkpoint
from gptx.checkpoints.tokenizer_files import gpt2_spec
from gptx.config import GPTConfig
from gptx.errors import ParameterError, TokenizeError
from gptx.loading import demo_path
from gptx.training.bpe import Encoder, load_tokenizer, tokenizer_from_spec, train_bpe
from gptx.training.data import split_documents
from gptx.training.options import DEFAULT_SHAPE, TrainOptions

if TYPE_CHECKING:
    from gptx.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class Start:
    """Model and tokenizer of a run before its first step.

    Attributes:
        config: the shape of the model.
        encoder: the tokenizer.
        tensors: canonical weights, or None: initialise at random.
        notes: what was decided, one line each.
    """

    config: GPTConfig
    encoder: Encoder
    tensors: Mapping[str, np.ndarray] | None
    notes: tuple[str, ...]


def from_scratch(options: TrainOptions, documents: Sequence[Sequence[str]]) -> Start:
    """Learns a BPE from the training documents of all files; the model's ids are the tokenizer's.

    Args:
        options: for the shape and ``pattern``.
        documents: of each file.
    """
    shape: dict[str, Any] = {n: getattr(options, n) or size for n, size in DEFAULT_SHAPE.items()}
    config = GPTConfig(n_inner=4 * shape["n_embd"], **shape)
    texts = (text for file in documents for text in split_documents(file)[0])
    encoder = Encoder(train_bpe(texts, config.vocab_size, options.pattern))
    notes = [f"tokenizer: {encoder.n_vocab:,} tokens learnt from the data"]
    if encoder.n_vocab < config.vocab_size:
        notes[0] += f"; the data has no use for {config.vocab_size:,}"
    return Start(replace(config, vocab_size=encoder.n_vocab), encoder, None, tuple(notes))


def from_checkpoint(options: TrainOptions) -> Start:
    """Model and tokenizer of ``options.init``: a ``.gptx`` file, "demo", or a foreign checkpoint.

    Raises:
        ParameterError: an option contradicts the checkpoint.
        TokenizeError: the checkpoint has no tokenizer.
        FileNotFoundError, ConvertError, ModelFileError, UnsafeCheckpointError: as when reading it.
    """
    assert options.init is not None
    config, tensors, spec, notes = _read(options.init)
    if config.labels:
        config = replace(config, labels=(), problem_type="")
        tensors = {name: tensors[name] for name in canonical_names(config)}
        notes = [*notes, "its classification head is left out"]
    for name in DEFAULT_SHAPE:
        _check_shape(name, getattr(options, name), getattr(config, name))
    if options.pattern is not None:
        allowed = "nothing with init: its tokenizer is kept"
        raise ParameterError("pattern", options.pattern, allowed)
    beside = Path(options.init) / "tokenizer.json"
    if spec is None:
        remedy = "put its tokenizer.json, or vocab.json and merges.txt, beside it"
        raise TokenizeError(f"{options.init}: no tokenizer found; {remedy}")
    # The file itself is kept where there is one: it may say more than gptx needs.
    encoder = Encoder(load_tokenizer(beside) if beside.is_file() else tokenizer_from_spec(spec))
    if encoder.n_vocab > config.vocab_size:
        have, most = encoder.n_vocab, config.vocab_size
        raise TokenizeError(f"{options.init}: tokenizer: expected at most {most} ids, got {have}")
    return Start(config, encoder, tensors, (f"continues {options.init}", *notes))


def _read(
    init: str,
) -> tuple[GPTConfig, Mapping[str, np.ndarray], TokenizerSpec | None, list[str]]:
    path = Path(init)
    if init == "demo" and not path.exists():
        path = demo_path()
    if path.is_file() and modelfile.is_model_file(path):
        model = modelfile.read(path)
        tensors = {name: model.weight(name) for name in canonical_names(model.config)}
        notes = [] if model.dtype == "float32" else [f"weights were rounded to {model.dtype}"]
        return model.config, tensors, model.tokenizer or _gpt2_tokenizer(model.config), notes
    checkpoint = read_checkpoint(path)
    spec = checkpoint.tokenizer or _gpt2_tokenizer(checkpoint.config)
    return checkpoint.config, checkpoint.tensors, spec, checkpoint.notes


def _gpt2_tokenizer(config: GPTConfig) -> TokenizerSpec | None:
    return gpt2_spec() if config.vocab_size == GPT2_VOCAB else None


def _check_shape(name: str, wanted: int | None, found: int) -> None:
    if wanted is None or wanted == found or (name == "block_size" and wanted < found):
        return
    limit = "at most " if name == "block_size" else ""
    raise ParameterError(name, wanted, f"{limit}{found}, as in the checkpoint of init")
