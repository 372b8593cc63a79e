"""tokenizer.json of the tokenizers library: byte-level BPE, anything else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptx.checkpoints.split_pattern import translate
from gptx.checkpoints.vocabulary import (
    Merges,
    NamedTokens,
    byte_level_spec,
    checked_vocab,
    expect,
    expect_object,
    read_json,
)
from gptx.errors import TokenizeError, shown
from gptx.tokenizer import GPT2_PATTERN, TokenizerSpec

_NO_SPLIT = r"[\s\S]+"


def read_tokenizer_json(path: Path) -> TokenizerSpec:
    """A tokenizer.json with a BPE model behind a ByteLevel pre-tokenizer.

    Post-processing, truncation and padding are not part of encoding and are passed over.

    Raises:
        TokenizeError: the file is damaged or holds something that gptx does not run.
    """
    values = read_json(path)
    model = expect_object(path, "model", values.get("model"))
    _refuse_unsupported(path, values, model)
    vocab = checked_vocab(path, "model.vocab", model.get("vocab"))
    named = NamedTokens()
    added = values.get("added_tokens") or []
    expect(path, "added_tokens", added, isinstance(added, list), "a list")
    for entry in added:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        named.add(path, "added_tokens", entry, token_id)
    pattern, prefix = _split(path, values.get("pre_tokenizer"))
    merges = _merges(path, model.get("merges"))
    spec = byte_level_spec(path, vocab, merges, named, pattern, add_prefix_space=prefix)
    if model.get("ignore_merges"):
        allowed = "false where the vocabulary has tokens that no merges make"
        expect(path, "model.ignore_merges", True, spec.merge_order == (), allowed)
    return spec


def _refuse_unsupported(path: Path, values: dict[str, Any], model: dict[str, Any]) -> None:
    kind = model.get("type", "BPE" if "merges" in model else None)
    expect(path, "model.type", kind, kind == "BPE", "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        expect(path, f"model.{name}", model.get(name), not model.get(name), "none")
    normalizer = values.get("normalizer")
    expect(path, "normalizer", _kind(normalizer), normalizer is None, "null")
    decoder = _kind(values.get("decoder"))
    expect(path, "decoder", decoder, decoder in ("ByteLevel", "none"), "ByteLevel")


def _split(path: Path, pre_tokenizer: object) -> tuple[str, bool]:
    """The split pattern, and whether a text gets a space in front."""
    steps: list[Any] = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = list(pre_tokenizer.get("pretokenizers") or [])
    kinds = [_kind(step) for step in steps]
    known = kinds in (["ByteLevel"], ["Split", "ByteLevel"])
    expect(path, "pre_tokenizer", kinds, known, "ByteLevel, or Split and ByteLevel")
    splits = steps[-1].get("use_regex", True)
    prefix = bool(steps[-1].get("add_prefix_space", True))
    if len(steps) == 1:
        return GPT2_PATTERN if splits else _NO_SPLIT, prefix
    where = "pre_tokenizer.ByteLevel"
    expect(path, f"{where}.use_regex", splits, not splits, "false behind a Split")
    expect(path, f"{where}.add_prefix_space", prefix, not prefix, "false behind a Split")
    pattern, behavior = steps[0].get("pattern"), steps[0].get("behavior")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    expect(path, "pre_tokenizer.Split.pattern", pattern, isinstance(regex, str), "a Regex")
    expect(path, "pre_tokenizer.Split.behavior", behavior, behavior == "Isolated", "Isolated")
    inverted = steps[0].get("invert", False)
    expect(path, "pre_tokenizer.Split.invert", inverted, not inverted, "false")
    try:
        return translate(str(regex)), False
    except ValueError as error:
        raise TokenizeError(f"{path}: pre_tokenizer.Split: {error}") from None


def _merges(path: Path, merges: object) -> Merges:
    """Merges as "a b" or as [a, b]."""
    expect(path, "model.merges", merges, isinstance(merges, list), "a list")
    pairs = []
    items: list[Any] = merges  # type: ignore[assignment]
    for rank, merge in enumerate(items):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        strings = isinstance(parts, list) and all(isinstance(p, str) and p for p in parts)
        if not strings or len(parts) != 2:
            raise TokenizeError(f"{path}: merge {rank}: expected two tokens, got {shown(merge)}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _kind(step: object) -> str:
    if step is None:
        return "none"
    kind = step.get("type") if isinstance(step, dict) else None
    return kind if isinstance(kind, str) else "something without a type"
