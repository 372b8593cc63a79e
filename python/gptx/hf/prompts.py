"""A padded batch: which of its tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ParameterError, TokenIdError
from gptx.hf.arrays import Array, device_of, matrix


class Batch(NamedTuple):
    """Attributes:
    ids: int64 ``[B, T]``, padding included.
    mask: bool ``[B, T]``: which of them count; in each row they are neighbours.
    device: that of the caller's torch tensors, None for numpy.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    device: Any

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each row begins, ``[B]``."""
        return self.mask.argmax(axis=1)

    def row(self, i: int) -> NDArray[np.int32]:
        """The tokens of a row, int32, without its padding."""
        return self.ids[i, self.mask[i]].astype(np.int32)


def batch(
    input_ids: Array, attention_mask: Array | None, vocab_size: int, *, name: str = "input_ids"
) -> Batch:
    """Checks a batch.

    Raises:
        ParameterError, TokenIdError: naming the argument that is wrong.
    """
    ids = matrix(name, input_ids)
    if attention_mask is None:
        mask = np.ones(ids.shape, bool)
    else:
        mask = matrix("attention_mask", attention_mask) != 0
        if mask.shape != ids.shape:
            allowed = f"the shape of {name}, {list(ids.shape)}"
            raise ParameterError("attention_mask", list(mask.shape), allowed)
    for i, row in enumerate(mask):
        places = np.flatnonzero(row)
        if len(places) == 0:
            raise ParameterError(name, f"row {i}", "at least one token in each row")
        if places[-1] - places[0] + 1 != len(places):
            allowed = "zeros at the ends of a row alone"
            raise ParameterError("attention_mask", row.astype(int).tolist(), allowed)
    wrong = mask & ((ids < 0) | (ids >= vocab_size))
    if wrong.any():
        i, t = np.argwhere(wrong)[0].tolist()
        raise TokenIdError(f"{name}[{i}]", t, int(ids[i, t]), vocab_size)
    return Batch(ids, mask, device_of(input_ids, attention_mask))


def check_positions(position_ids: Array | None, found: Batch) -> None:
    """Raises ParameterError for positions that do not count each row's tokens from 0."""
    if position_ids is None:
        return
    given = matrix("position_ids", position_ids)
    expected = np.cumsum(found.mask, axis=1) - 1
    same = given.shape[1] == found.length and (given == expected)[found.mask].all()
    if not same:
        allowed = "attention_mask.cumsum(-1) - 1: positions from 0 in each row"
        raise ParameterError("position_ids", given.tolist(), allowed)


def without_padding(input_ids: Array, pad: int | None, ends: Sequence[int]) -> Array | None:
    """The attention mask that transformers infers: padding is told by a ``pad`` that is no end
    token; None where it cannot be told."""
    ids = matrix("input_ids", input_ids)
    if pad is None or pad in ends or not (ids == pad).any():
        return None
    return (ids != pad).astype(np.int64)
