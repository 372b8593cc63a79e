"""A text in the KV cache that its owner controls: feed, look, fork, go back.

>>> base = model.branch("The capital of France is")
>>> base.logits[-1].argmax()          # what would come next
>>> other = base.fork()               # shares what was computed
>>> base.feed(" Paris"), other.feed(" London")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ContextLengthError, ParameterError, UnsupportedError

if TYPE_CHECKING:
    from gptx.model import Model


class Branch:
    """Made by `Model.branch`; one thread at a time. While it rests, others may take its memory:
    then it is computed again, to the same bits, when it is fed.

    Attributes:
        logits: float32 ``[n, V]`` of the last n tokens that were fed; of a fork its parent's; empty
            after `truncate`.
        hidden: float32 ``[n, C]``, the states after the final norm, where they were asked for.
    """

    def __init__(self, model: Model, request: int, *, hidden: bool) -> None:
        self._model = model
        self._request = request
        self._hidden = hidden
        self._open = True
        self.logits: NDArray[np.float32] = np.zeros((0, model.config.vocab_size), np.float32)
        self.hidden: NDArray[np.float32] = np.zeros((0, model.config.n_embd), np.float32)

    def __enter__(self) -> Branch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._model._engine.tokens(self._alive())

    def feed(
        self, tokens: str | Sequence[int] | NDArray[np.integer], *, logits: int = 1
    ) -> NDArray[np.float32]:
        """Appends tokens and computes them.

        Args:
            tokens: a text or ids; at least one token, and no more than the context has room for.
            logits: of how many of the last tokens the logits are wanted.

        Returns:
            `logits`.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: nothing was fed.
        """
        ids = self._model._ids(tokens)
        have, limit = len(self), self._model.config.block_size
        if have + len(ids) > limit:
            raise ContextLengthError(have + len(ids), limit, "go back with truncate")
        if type(logits) is not int or not 1 <= logits <= len(ids):
            raise ParameterError("logits", logits, f"an integer from 1 to {len(ids)}")
        self._model._engine.feed(self._alive(), ids, logits)
        return self._compute()

    def fork(self) -> Branch:
        """Another branch that begins like this one and shares its memory until either is fed."""
        fork = Branch(self._model, self._model._engine.fork(self._alive()), hidden=self._hidden)
        fork.logits, fork.hidden = self.logits, self.hidden
        return fork

    def truncate(self, n: int) -> None:
        """Goes back to the first n tokens.

        Raises:
            ParameterError: n is not in 1 to ``len(branch)``.
        """
        if type(n) is not int or not 1 <= n <= len(self):
            raise ParameterError("n", n, f"an integer from 1 to {len(self)}")
        self._model._engine.truncate(self._alive(), n)
        self.logits, self.hidden = self.logits[:0], self.hidden[:0]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes the tokens with their keys and values to a file, for `Model.restore`.

        Args:
            path: the file; it appears whole or not at all.
            force: replace a file that exists.

        Raises:
            ParameterError, ConvertError: it exists, or cannot be written.
        """
        from gptx import session

        session.save(self, path, force=force)

    def close(self) -> None:
        """Gives the memory back."""
        if self._open:
            self._open = False
            self._model._engine.release(self._request)

    def _alive(self) -> int:
        if not self._open:
            raise UnsupportedError("branch: expected an open one, got one that was closed")
        return self._request

    def _compute(self) -> NDArray[np.float32]:
        self._model._engine.advance([self._request])
        self.logits = self._model._engine.held_logits(self._request)
        if self._hidden:
            self.hidden = self._model._engine.held_hidden(self._request)
        return self.logits
