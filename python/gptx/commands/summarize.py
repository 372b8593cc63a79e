"""``gptx summarize``."""

from __future__ import annotations

import argparse

from gptx.commands import add_recipe_options, load_model, print_recipe, recipe_params, text_or_stdin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx summarize``."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="default, or '-': stdin")
    parser.add_argument(
        "--sentences", type=int, default=3, metavar="N", help="print the first so many (default 3)"
    )
    add_recipe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``gptx summarize`` with parsed arguments; returns the exit code."""
    from gptx import tasks

    text = text_or_stdin(options.text, "TEXT")
    result = tasks.summarize(
        text,
        sentences=options.sentences,
        model=load_model(options),
        detail=options.json,
        **recipe_params(options),
    )
    return print_recipe(result)
