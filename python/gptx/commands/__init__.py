"""Commands of ``gptx`` that are made of the library: their options, and what they print."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptx.model import Model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and what it runs on."""
    parser.add_argument("-m", "--model", help="a .gptx file or checkpoint (default: the demo)")
    parser.add_argument("--threads", type=int, help="default: as many as the machine has cores")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, or auto")
    parser.add_argument(
        "--precision", help="how to compute; default what the weights are stored as"
    )


def load_model(options: argparse.Namespace) -> Model:
    """The model that `add_model_options` names, else that of GPTX_MODEL, else the demo."""
    import gptx

    return gptx.load(
        options.model or os.environ.get("GPTX_MODEL"),
        device=options.device,
        threads=options.threads,
        precision=options.precision,
    )


def text_or_stdin(text: str | None, name: str) -> str:
    """The text of an argument; where it is absent or "-", standard input without its last newline.

    Raises:
        ParameterError: there is none, and standard input is a terminal.
    """
    from gptx.errors import ParameterError

    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        raise ParameterError(name, None, "a text, or one on standard input")
    return sys.stdin.read().removesuffix("\n")
