"""``gptx answer``."""

from __future__ import annotations

import argparse

from gptx.commands import add_recipe_options, load_model, print_recipe, recipe_params, text_or_stdin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx answer``."""
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="default, or '-': stdin")
    parser.add_argument("--context", metavar="TEXT", help="what the question is about")
    add_recipe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``gptx answer`` with parsed arguments; returns the exit code."""
    from gptx import tasks

    question = text_or_stdin(options.question, "QUESTION")
    result = tasks.answer(
        question,
        context=options.context,
        model=load_model(options),
        detail=options.json,
        **recipe_params(options),
    )
    return print_recipe(result)
