"""Text as it is generated: `generate` puts token ids in, whole words come out."""

from __future__ import annotations

import unicodedata
from queue import Queue
from typing import TYPE_CHECKING, Any

from gptx.errors import ParameterError

if TYPE_CHECKING:
    from gptx.hf.tokenizer import GPT2Tokenizer

_CHINESE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class BaseStreamer:
    """What ``streamer`` of `generate` may be: the prompt is put first, then every token."""

    def put(self, value: Any) -> None:
        """Takes ids: ``[B, T]`` of the prompts, then ``[B]`` of each token."""
        raise NotImplementedError

    def end(self) -> None:
        """There will be no more."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints the text of one sequence, word by word.

    Args:
        tokenizer: what decodes.
        skip_prompt: leave the prompt out.
        **decode_kwargs: of the tokenizer's ``decode``, such as ``skip_special_tokens``.
    """

    def __init__(
        self, tokenizer: GPT2Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self.token_cache: list[int] = []
        self.print_len = 0
        self.next_tokens_are_prompt = True

    def put(self, value: Any) -> None:
        """Raises ParameterError for more than one sequence."""
        if len(value.shape) > 1:
            if value.shape[0] > 1:
                raise ParameterError("streamer", type(self).__name__, "a batch of one for it")
            value = value[0]
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(value.tolist())
        text = self._decoded(self.token_cache)
        new = text[self.print_len :]
        if text.endswith("\n"):
            # The last token stays: what follows is decoded behind it, as it is in the whole text.
            self.token_cache = self.token_cache[-1:]
            self.print_len = len(self._decoded(self.token_cache))
        else:
            if not (text and _is_chinese(text[-1])) and not all(map(_is_certain, new)):
                new = text[self.print_len : text.rfind(" ") + 1]
            self.print_len += len(new)
        self.on_finalized_text(new)

    def end(self) -> None:
        text = self._decoded(self.token_cache)[self.print_len :] if self.token_cache else ""
        self.token_cache = []
        self.print_len = 0
        self.next_tokens_are_prompt = True
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints a piece; for classes derived from this one to do otherwise."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs)


class TextIteratorStreamer(TextStreamer):
    """The pieces as an iterator, for a thread beside that of `generate`.

    Args:
        timeout: seconds to wait for a piece before ``queue.Empty`` is raised; None waits forever.
    """

    def __init__(
        self,
        tokenizer: GPT2Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


def _is_chinese(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _CHINESE)


def _is_certain(character: str) -> bool:
    """Letters, digits and spaces; a symbol may be part of a character that is not complete."""
    return character.isspace() or unicodedata.category(character)[0] in "LMN"
