"""``gptx translate``."""

from __future__ import annotations

import argparse

from gptx.commands import add_recipe_options, load_model, print_recipe, recipe_params, text_or_stdin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx translate``."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="default, or '-': stdin")
    parser.add_argument("--to", required=True, metavar="LANGUAGE", help="such as French")
    parser.add_argument("--from", dest="source", default="English", metavar="LANGUAGE")
    add_recipe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``gptx translate`` with parsed arguments; returns the exit code."""
    from gptx import tasks

    text = text_or_stdin(options.text, "TEXT")
    result = tasks.translate(
        text,
        to=options.to,
        source=options.source,
        model=load_model(options),
        detail=options.json,
        **recipe_params(options),
    )
    return print_recipe(result)
