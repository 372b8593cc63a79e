"""Text from a stream of tokens: whole characters only, and stop strings across token borders."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Sequence

from gptx.errors import ParameterError


class IncrementalDecoder:
    """Turns ids into text one by one. The pieces joined equal ``Tokenizer.decode`` of all ids.

    A piece never ends inside a character: up to 3 bytes are held back until it is complete or
    proves invalid. Made by `Tokenizer.decoder`; one thread at a time.
    """

    def __init__(self, token_bytes: Callable[[object, int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes nothing.

        Raises:
            TokenIdError: not an id of the model; its index is that in the stream.
        """
        token = self._token_bytes(token_id, self._count)
        self._count += 1
        return self._utf8.decode(token)

    def fork(self) -> IncrementalDecoder:
        """Another decoder that has seen the same ids."""
        twin = copy.copy(self)
        twin._utf8 = copy.copy(self._utf8)
        return twin

    def finish(self) -> str:
        """What was held back, as U+FFFD. The decoder is then ready for a new stream."""
        self._count = 0
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class StopMatcher:
    """Passes a stream of text on, up to the first stop string.

    The match that begins first in the text wins, however the text is cut into pieces; where
    several begin there, the shortest. At most ``max(len(stop)) - 1`` characters are held back.

    Args:
        stop: the stop strings, a single one, or None for none.

    Attributes:
        stopped: a stop string was found; the text is complete.
        matched: that stop string, or None.

    Raises:
        ParameterError: a stop string is empty or not a str.
    """

    def __init__(self, stop: str | Sequence[str] | None = None) -> None:
        texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray):
            raise ParameterError("stop", stop, "a str or a sequence of str")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ParameterError("stop", stop, "strings of at least one character")
        self._stops = sorted(texts, key=len)
        self._longest = max(map(len, texts), default=0)
        self._first = {text[0] for text in texts}
        self._held = ""
        self.stopped = False
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Takes the next piece of the text and returns what is certain to be passed on."""
        if self.stopped:
            return ""
        text = self._held + piece
        found, matched = self._find(text)
        undecided = self._undecided_from(text)
        if matched is not None and found <= undecided:
            return self._stop_at(text, found, matched)
        self._held = text[undecided:]
        return text[:undecided]

    def finish(self) -> str:
        """The rest, when no more text will come."""
        text, self._held = self._held, ""
        found, matched = self._find(text)
        return text if matched is None else self._stop_at(text, found, matched)

    def _find(self, text: str) -> tuple[int, str | None]:
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        return min(matches, key=lambda match: match[0], default=(-1, None))

    def _undecided_from(self, text: str) -> int:
        """Where the first stop string that may still be completed begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] not in self._first:
                continue
            rest = text[start:]
            if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stops):
                return start
        return len(text)

    def _stop_at(self, text: str, end: int, matched: str) -> str:
        self.stopped, self.matched, self._held = True, matched, ""
        return text[:end]
