"""``gptx classify``: labels by a prompt, or by a model's own head."""

from __future__ import annotations

import argparse
import json

from gptx.commands import add_model_options, load_model, text_or_stdin
from gptx.errors import ParameterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx classify``."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="default, or '-': one from stdin")
    parser.add_argument(
        "--labels", metavar="A,B", help="ask for one of these; default the head of the model"
    )
    parser.add_argument("--template", metavar="T", help="a prompt with {text}, then {label}")
    parser.add_argument(
        "--example",
        nargs=2,
        action="append",
        metavar=("TEXT", "LABEL"),
        help="an example in front; repeatable",
    )
    parser.add_argument("--normalize", help="compare label scores by sum (default), mean or bytes")
    parser.add_argument(
        "--calibrate", action="store_true", help="take out what the model prefers anyway"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each text")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``gptx classify`` with parsed arguments; returns the exit code."""
    from gptx import tasks

    texts = [text for text in options.texts if text != "-"]
    if len(texts) < len(options.texts) or not texts:
        texts.append(text_or_stdin("-" if options.texts else None, "TEXT"))
    names = ("template", "example", "normalize", "calibrate")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.labels is None:
        if given:
            name = next(iter(given))
            raise ParameterError(name, given[name], "none without --labels")
        results = load_model(options).classify(texts)
    else:
        labels = [label.strip() for label in options.labels.split(",") if label.strip()]
        if "example" in given:
            given["examples"] = [tuple(pair) for pair in given.pop("example")]
        # Refused before a model is loaded.
        if len(labels) < 2:
            allowed = "at least two, with commas between them"
            raise ParameterError("labels", options.labels, allowed)
        results = tasks.classify(texts, labels, model=load_model(options), **given)
    assert isinstance(results, list)
    for text, result in zip(texts, results, strict=True):
        if options.json:
            fields = {
                "text": text,
                "label": result.label,
                "labels": result.labels,
                "probabilities": result.probabilities,
                "logits": result.logits.tolist(),
            }
            print(json.dumps(fields, ensure_ascii=False))
        else:
            shown = ", ".join(f"{k} {p:.3f}" for k, p in result.probabilities.items())
            print(f"{result.label}\t{shown}")
    return 0
