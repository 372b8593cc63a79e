"""Keys and values that a script carries from call to call: ``past_key_values``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptx.branch import Branch
from gptx.errors import ParameterError


class Cache:
    """A branch for each row of a batch. Calling the model with it appends to it."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self._branches = list(branches)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(map(len, self._branches))

    def crop(self, max_length: int) -> None:
        """Goes back to the first tokens of each row; of a negative number, by so many."""
        for branch in self._branches:
            branch.truncate(max_length if max_length > 0 else len(branch) + max_length)

    def feed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends ``[B, T]`` and returns logits ``[B, T, V]``.

        Raises:
            ParameterError: another number of rows.
        """
        if len(ids) != len(self._branches):
            allowed = f"a cache of {len(ids)} rows"
            raise ParameterError("past_key_values", f"one of {len(self._branches)}", allowed)
        rows = [b.feed(row, logits=len(row)) for b, row in zip(self._branches, ids, strict=True)]
        return np.stack(rows)
