"""Tokenizers as other programs store them, read into a `TokenizerSpec`.

tokenizer.json (byte-level BPE), vocab.json + merges.txt, encoder.json + vocab.bpe, .tiktoken, and
nanoGPT's tables of characters. What cannot be honoured exactly is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptx.checkpoints.tokenizer_json import read_tokenizer_json
from gptx.checkpoints.vocabulary import (
    NamedTokens,
    by_id,
    byte_level_spec,
    checked_vocab,
    expect_object,
    read_bytes,
    read_json,
    read_text,
)
from gptx.errors import TokenizeError, shown
from gptx.tokenizer import END_OF_TEXT, GPT2_PATTERN, TokenizerSpec

_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_REFUSED = {
    "vocab.txt": "WordPiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
}
_GPT2_RANKS = 50_256
_OTHER_RANKS = {100_256: "cl100k_base", 199_998: "o200k_base"}
_RANK = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,10})")
_SPECIAL_LOOK = re.compile(r"<[^<>]+>|\[[A-Z0-9_]+\]")


def from_folder(path: str | os.PathLike[str]) -> TokenizerSpec | None:
    """The tokenizer of a Hugging Face or OpenAI folder, or None where it has none.

    tokenizer.json comes first, then a vocabulary with its merges, then one ``.tiktoken`` file.

    Raises:
        TokenizeError: the files are damaged, disagree, or hold a kind that gptx does not run.
    """
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _from_vocab(folder / vocab, folder / merges)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) > 1:
        names = ", ".join(p.name for p in ranks[:5])
        raise TokenizeError(f"{folder}: expected one .tiktoken file, got {names}; name the file")
    if ranks:
        return _from_ranks(ranks[0])
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() or (folder / merges).is_file():
            raise TokenizeError(f"{folder}: expected {vocab} with {merges}, got one of them")
    for name, kind in _REFUSED.items():
        if (folder / name).is_file():
            raise TokenizeError(f"{folder / name}: expected byte-level BPE, got {kind}")
    return None


def from_file(path: str | os.PathLike[str]) -> TokenizerSpec:
    """The tokenizer of one file, its kind found by content; a vocabulary finds its merges beside.

    Raises:
        FileNotFoundError: there is no such file.
        TokenizeError: as `from_folder`, or not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        spec = from_folder(path)
        if spec is None:
            raise TokenizeError(f"{path}: expected a folder with a tokenizer, found none")
        return spec
    data = read_bytes(path)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        if isinstance(read_json(path).get("model"), dict):
            return _from_tokenizer_json(path)
        return _from_vocab(path, _beside(path, 1))
    lines = data.splitlines()[:16]
    if lines and all(_RANK.fullmatch(line) for line in lines):
        return _from_ranks(path)
    if lines and all(len(line.split(b" ")) == 2 for line in lines):
        return _from_vocab(_beside(path, 0), path)
    raise TokenizeError(
        f"{path}: expected tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe "
        f"or a .tiktoken file, got a file that begins with {shown(data[:16])}"
    )


def gpt2_spec() -> TokenizerSpec:
    """GPT-2's tokenizer from tiktoken, which downloads it once and checks its hash.

    Raises:
        TokenizeError: it is neither in tiktoken's cache nor can it be downloaded.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise TokenizeError(
            f"GPT-2's vocabulary: tiktoken could not download it ({type(error).__name__}); put the "
            "files of the tokenizer beside the checkpoint, name them with --tokenizer, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy"
        ) from error
    tokens = tuple(encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token))
    return TokenizerSpec("bpe", tokens, GPT2_PATTERN, {END_OF_TEXT: encoding.eot_token})


def from_chars(stoi: Mapping[str, int]) -> TokenizerSpec:
    """nanoGPT's table of characters: ``stoi`` of its meta.pkl, character -> id.

    Raises:
        TokenizeError: a key is not one character, or an id is not an integer or not unique.
    """
    tokens: dict[int, bytes] = {}
    for char, value in stoi.items():
        if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
            raise TokenizeError(f"stoi: expected single characters, got {shown(char)}")
        try:
            i = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            i = -1
        if i < 0 or i in tokens:
            raise TokenizeError(f"stoi[{char!r}]: expected an id of its own, got {shown(value)}")
        tokens[i] = char.encode()
    if not tokens:
        raise TokenizeError("stoi: expected at least one character, got none")
    return TokenizerSpec("chars", by_id("stoi", tokens), "", {})


def _from_tokenizer_json(path: Path) -> TokenizerSpec:
    spec = read_tokenizer_json(path)
    config = read_json(path.with_name("tokenizer_config.json"), optional=True)
    if spec.pattern == GPT2_PATTERN and _is_gpt2_class(config):
        return replace(spec, add_prefix_space=bool(config.get("add_prefix_space", False)))
    return spec


def _is_gpt2_class(config: dict[str, Any]) -> bool:
    """transformers builds these from the vocabulary and takes the prefix from the config alone."""
    return config.get("tokenizer_class") in ("GPT2Tokenizer", "GPT2TokenizerFast")


def _from_vocab(vocab_path: Path, merges_path: Path) -> TokenizerSpec:
    vocab = checked_vocab(vocab_path, "vocabulary", read_json(vocab_path))
    merges = _read_merges(merges_path)
    config = read_json(vocab_path.with_name("tokenizer_config.json"), optional=True)
    named = _named_beside(vocab_path, config)
    made = {left + right for left, right in merges}
    for entry, i in vocab.items():
        if entry in made or len(entry) == 1 or entry in named.special or entry in named.added:
            continue
        if not _SPECIAL_LOOK.fullmatch(entry):
            raise TokenizeError(
                f"{vocab_path}: token {i} ({entry[:80]!r}): expected a merge in {merges_path.name} "
                "that makes it, found none; the two files do not belong together"
            )
        named.special[entry] = i
    prefix = bool(config.get("add_prefix_space", False))
    return byte_level_spec(merges_path, vocab, merges, named, GPT2_PATTERN, add_prefix_space=prefix)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizeError(
                f"{path}: line {number}: expected two tokens and a space, got {shown(line)}"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _named_beside(vocab_path: Path, config: dict[str, Any]) -> NamedTokens:
    """Special and added tokens from tokenizer_config.json, added_tokens.json and the like."""
    named = NamedTokens()
    path = vocab_path.with_name("tokenizer_config.json")
    decoder = expect_object(path, "added_tokens_decoder", config.get("added_tokens_decoder", {}))
    for key, entry in decoder.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 11 else key
        named.add(path, "added_tokens_decoder", entry, token_id)
    path = vocab_path.with_name("special_tokens_map.json")
    special = _texts(list(read_json(path, optional=True).values()))
    special |= _texts([value for key, value in config.items() if key.endswith("_token")])
    path = vocab_path.with_name("added_tokens.json")
    for text, token_id in read_json(path, optional=True).items():
        if text not in named.special and text not in named.added:
            entry = {"content": text, "special": text in special}
            named.add(path, "added_tokens", entry, token_id)
    return named


def _texts(values: list[Any]) -> set[str]:
    """The texts of tokens that are given as a str, as an object with content, or in a list."""
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    contents = [v.get("content") if isinstance(v, dict) else v for v in flat]
    return {content for content in contents if isinstance(content, str)}


def _from_ranks(path: Path) -> TokenizerSpec:
    """A ``.tiktoken`` file: base64 and rank, a line each. It holds no pattern: GPT-2's is meant."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        match = _RANK.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token or int(match[2]) in tokens:
            raise TokenizeError(
                f"{path}: line {number}: expected base64 and a rank of its own, got {shown(line)}"
            )
        tokens[int(match[2])] = token
    if len(tokens) in _OTHER_RANKS:
        raise TokenizeError(
            f"{path}: expected ranks for GPT-2's split pattern, got those of "
            f"{_OTHER_RANKS[len(tokens)]}, which splits otherwise; use a tokenizer.json"
        )
    special = {END_OF_TEXT: _GPT2_RANKS} if len(tokens) == _GPT2_RANKS == max(tokens) + 1 else {}
    try:
        return TokenizerSpec("bpe", by_id(path, tokens), GPT2_PATTERN, special)
    except ValueError as error:
        raise TokenizeError(f"{path}: {error}") from None


def _beside(path: Path, which: int) -> Path:
    """The other file of a pair: 0 for the vocabulary, 1 for the merges."""
    pairs = [pair for pair in _PAIRS if pair[1 - which] == path.name] or list(_PAIRS)
    for pair in pairs:
        if path.with_name(pair[which]).is_file():
            return path.with_name(pair[which])
    names = " or ".join(pair[which] for pair in pairs)
    raise TokenizeError(f"{path}: expected {names} beside it, found none")
