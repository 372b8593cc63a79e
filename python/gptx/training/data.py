"""Text files to token arrays, and batches that are a pure function of (seed, row number).

Documents are separated by lines that hold only ``<|endoftext|>``; this token starts every document
in the arrays. One document in a hundred, chosen by its SHA-256, is held out for validation. No
iterator has a state, so a resumed run draws exactly the batches of an uninterrupted one.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.errors import ParameterError

END_OF_TEXT = "<|endoftext|>"
_OPENERS: dict[str, Callable[..., object]] = {".xz": lzma.open, ".gz": gzip.open}
_TAIL = 20
_ENCODE_AT_ONCE = 1000
_CYCLE = 1000  # rows after which the mixture repeats; a weight is exact to one part in this


def read_documents(path: Path) -> list[str]:
    """Documents of a UTF-8 file (``.xz`` and ``.gz`` are unpacked), stripped, none empty."""
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ParameterError("data", str(path), f"UTF-8 text ({error})") from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ParameterError("data", str(path), f"an intact compressed file ({error})") from error
    documents = f"\n{text}\n".split(f"\n{END_OF_TEXT}\n")
    return [document for document in map(str.strip, documents) if document]


def is_held_out(document: str) -> bool:
    """True for about 1 % of all texts: those whose SHA-256, as a number, is divisible by 100."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest(), "big") % 100 == 0


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    Where the hash leaves one side empty, as with a file that is one long text, the last twentieth
    of the whole text is held out instead.
    """
    train = [document for document in documents if not is_held_out(document)]
    if documents and len(train) in (0, len(documents)):
        text = "\n\n".join(documents)
        cut = len(text) - len(text) // _TAIL
        return [text[:cut]], [text[cut:]] if cut < len(text) else []
    return train, [document for document in documents if is_held_out(document)]


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one file.

    Attributes:
        name: of the file.
        train, val: uint16 ``[n]``, or uint32 where there are more than 65,536 ids.
        val_characters: of the held-out text, for losses per character.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    val_characters: int

    def digest(self) -> str:
        """SHA-256 of the training tokens, in hexadecimal."""
        return hashlib.sha256(self.train.astype("<u4").tobytes()).hexdigest()


def tokenize_file(
    name: str,
    documents: Sequence[str],
    encode_batch: Callable[[Sequence[str]], list[list[int]]],
    *,
    start_ids: Sequence[int],
    n_vocab: int,
) -> TokenSet:
    """Encodes the documents of a file.

    Args:
        name: the file, for messages.
        documents: the texts.
        encode_batch: token ids of each of many texts.
        start_ids: what every document begins with, the end-of-text token.
        n_vocab: highest id + 1.

    Raises:
        TokenizeError: a text cannot be spelled.
    """
    dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32

    def tokens(texts: Sequence[str]) -> np.ndarray:
        parts = [np.zeros(0, dtype)]
        for first in range(0, len(texts), _ENCODE_AT_ONCE):
            for ids in encode_batch(texts[first : first + _ENCODE_AT_ONCE]):
                parts.append(np.array([*start_ids, *ids], dtype=dtype))
        return np.concatenate(parts)

    train, val = split_documents(documents)
    return TokenSet(name, tokens(train), tokens(val), sum(map(len, val)))


class Batches:
    """Training rows, drawn from each file without replacement; a row needs none before it.

    Rows follow a fixed cycle that holds every file in proportion to its weight. The k-th row of a
    file is window k of a permutation that depends on (seed, file, epoch) only.

    Args:
        token_sets: the files.
        mix: one positive weight per file.
        block_size: T, tokens in a row.
        seed: any non-negative integer.
    """

    def __init__(
        self, token_sets: Sequence[TokenSet], mix: Sequence[float], block_size: int, seed: int
    ) -> None:
        for token_set in token_sets:
            if len(token_set.train) <= 2 * block_size:
                allowed = f"more than {2 * block_size} tokens of training text in {token_set.name}"
                raise ParameterError("data", len(token_set.train), allowed)
        self._tokens = [token_set.train for token_set in token_sets]
        self._block_size = block_size
        self._seed = seed
        self._epochs: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        counts = _apportion(mix, max(_CYCLE, 10 * len(mix)))
        cycle = np.repeat(np.arange(len(counts)), counts)
        self._cycle = np.random.default_rng([seed, 0]).permutation(cycle)
        one_hot = self._cycle[:, None] == np.arange(len(counts))
        self._rank = np.cumsum(one_hot, axis=0)[np.arange(len(cycle)), self._cycle] - 1
        self._counts = counts

    def rows(self, first: int, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``first .. first + n_rows``: inputs and targets, int64 ``[n_rows, T]``."""
        rows = np.stack([self._row(g) for g in range(first, first + n_rows)]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:]

    def _row(self, g: int) -> np.ndarray:
        n_cycles, place = divmod(g, len(self._cycle))
        i_file = int(self._cycle[place])
        k = n_cycles * int(self._counts[i_file]) + int(self._rank[place])
        tokens, size = self._tokens[i_file], self._block_size
        n_windows = (len(tokens) - 1) // size - 1
        epoch, index = divmod(k, n_windows)
        shift, order = self._epoch(i_file, epoch, n_windows)
        start = shift + int(order[index]) * size
        row: np.ndarray = tokens[start : start + size + 1]
        return row

    def _epoch(self, i_file: int, epoch: int, n_windows: int) -> tuple[int, np.ndarray]:
        if (i_file, epoch) not in self._epochs:
            rng = np.random.default_rng([self._seed, 1, i_file, epoch])
            self._epochs = {key: v for key, v in self._epochs.items() if key[0] != i_file}
            shift = int(rng.integers(self._block_size))
            self._epochs[i_file, epoch] = (shift, rng.permutation(n_windows))
        return self._epochs[i_file, epoch]


def _apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Splits ``total`` in proportion to the weights, at least 1 each (largest remainders)."""
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts: np.ndarray = np.maximum(np.floor(share).astype(np.int64), 1)
    while counts.sum() < total:
        counts[np.argmax(share - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 1, counts - share, -np.inf))] -= 1
    return counts
