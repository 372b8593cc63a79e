"""What a training run shows: a bar that is redrawn on a terminal, else a line now and then."""

from __future__ import annotations

import shutil
import time
import unicodedata
from typing import TextIO

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 10.0
_BAR_CELLS = 20


class Progress:
    """Lines and one progress bar on a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._next = 0.0
        self._drawn = False

    def line(self, text: str) -> None:
        """Prints lines that stay."""
        self._erase()
        print(_printable(text), file=self._stream, flush=True)

    def bar(self, done: float, text: str) -> None:
        """Shows the part done (0 to 1) and a text, unless it was shown a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        if not self._terminal:
            self._next = now + _LINE_SECONDS
            self.line(text)
            return
        self._next = now + _REDRAW_SECONDS
        cells = round(done * _BAR_CELLS)
        bar = f"|{'#' * cells}{'.' * (_BAR_CELLS - cells)}| {text}"
        self._erase()
        self._stream.write(bar[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._drawn = True

    def close(self) -> None:
        """Takes the bar away."""
        self._erase()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._drawn = False


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str) -> str:
    """Samples come from a model and may spell control characters; a terminal must not obey them."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
