"""What `gptx info FILE` prints about a model file."""

from __future__ import annotations

from gptx.modelfile.header import FORMAT, VERSION
from gptx.modelfile.reader import ModelFile


def describe(model: ModelFile) -> list[tuple[str, str]]:
    """Name and value of everything worth knowing, in the order to print it.

    Text from the file is shown without control characters.
    """
    config = model.config
    rows = [
        ("file", str(model.path)),
        ("size", f"{model.size:,} bytes"),
        ("format", f"{FORMAT} {VERSION}, {len(model.tensors)} tensors, checksums"),
        ("source", model.source or "not recorded"),
        ("license", model.license or "not recorded"),
        ("dtype", model.dtype),
        ("parameters", f"{config.n_params:,}"),
        *((name, str(value)) for name, value in config.to_dict().items()),
        *_tokenizer_rows(model),
        *_rows("generation", model.generation),
        *_rows("parity", model.parity if model.parity is not None else "not measured"),
    ]
    return [(_printable(name), _printable(value)) for name, value in rows]


def _tokenizer_rows(model: ModelFile) -> list[tuple[str, str]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [("tokenizer", "none")]
    named = tokenizer.special_tokens | tokenizer.added_tokens
    specials = ", ".join(f"{text} = {i}" for text, i in named.items())
    return [
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.n_vocab:,} tokens"),
        ("special tokens", specials or "none"),
    ]


def _rows(name: str, value: object) -> list[tuple[str, str]]:
    """A nested object as dotted names."""
    if not isinstance(value, dict):
        return [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]
    return [row for key, item in value.items() for row in _rows(f"{name}.{key}", item)]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
