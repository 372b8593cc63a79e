"""``gptx eval``: tasks of the lm-evaluation-harness, or figures of a text without it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from gptx.commands import add_model_options, load_model
from gptx.errors import ParameterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx eval``."""
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tasks", metavar="A,B", help="tasks of the lm-evaluation-harness (needs gptx[eval])"
    )
    what.add_argument(
        "--builtin",
        action="store_true",
        help="perplexity, bits per byte and last words of --data",
    )
    parser.add_argument("--data", metavar="FILE", help="a text in UTF-8, for --builtin")
    parser.add_argument("--include-path", metavar="DIR", help="further tasks, for --tasks")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of a task at most")
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="examples for each question")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs ``gptx eval`` with parsed arguments; returns the exit code."""
    if options.builtin:
        return _builtin(options)
    if options.data is not None:
        raise ParameterError("data", options.data, "none with --tasks, which have their own")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ParameterError("include_path", options.include_path, "a folder")
    from gptx.evaluation import evaluate_tasks

    names = [name for name in options.tasks.split(",") if name]
    found = evaluate_tasks(
        load_model(options),
        names,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    if options.json:
        kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}
        print(json.dumps(kept, ensure_ascii=False, default=str))
        return 0
    from lm_eval.utils import make_table

    print(make_table(found))
    return 0


def _builtin(options: argparse.Namespace) -> int:
    from gptx.evaluation import evaluate_text

    for name in ("include_path", "num_fewshot"):
        if getattr(options, name) is not None:
            raise ParameterError(name, getattr(options, name), "none with --builtin")
    if options.data is None:
        raise ParameterError("data", None, "a text file, with --builtin")
    limit = options.limit
    if limit is not None and not float(limit).is_integer():
        raise ParameterError("limit", limit, "a number of paragraphs")
    try:
        text = Path(options.data).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ParameterError("data", options.data, "a text in UTF-8") from None
    figures = evaluate_text(load_model(options), text, limit=None if limit is None else int(limit))
    values = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in figures._asdict().items()
    }
    if options.json:
        print(json.dumps(values))
        return 0
    width = max(map(len, values))
    for name, value in values.items():
        shown = (
            "none" if value is None else f"{value:.4f}" if type(value) is float else f"{value:,}"
        )
        print(f"{name:<{width}}  {shown}")
    return 0
