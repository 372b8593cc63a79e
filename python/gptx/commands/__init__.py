"""Commands of ``gptx`` that are made of the library: their options, and what they print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any

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


def text_or_stdin(text: str | None, name: str, *, whole: bool = False) -> str:
    """The text of an argument; where it is absent or "-", standard input without its last newline,
    unless it is wanted whole.

    Raises:
        ParameterError: there is none, and standard input is a terminal, or no UTF-8.
    """
    from gptx.errors import ParameterError

    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        raise ParameterError(name, None, "a text, or one on standard input")
    try:
        read = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ParameterError("standard input", error.object[:40], "a text in UTF-8") from None
    return read if whole else read.removesuffix("\n")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """How a recipe generates; what is not given is the recipe's own."""
    parser.add_argument("-n", "--max-new-tokens", type=int, help="tokens to generate at most")
    parser.add_argument("-t", "--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--json", action="store_true", help="the whole result as one JSON object")
    add_model_options(parser)


def recipe_params(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingParams` that were given."""
    names = ("max_new_tokens", "temperature", "top_k", "seed")
    return {n: getattr(options, n) for n in names if getattr(options, n) is not None}


def print_recipe(result: object) -> int:
    """Prints a text, or a `Generation` as JSON; returns the exit code."""
    if isinstance(result, str):
        print(result)
        return 0
    fields = dataclasses.asdict(result)  # type: ignore[call-overload]
    print(json.dumps({k: v for k, v in fields.items() if k != "error"}, ensure_ascii=False))
    return 0
