"""``gptx train``: its options, and what must be there before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import MISSING, fields
from importlib import import_module

from gptx.errors import MissingExtraError, ParameterError
from gptx.training.options import DEFAULT_SHAPE, TrainOptions

_GROUPS: dict[str, dict[str, tuple[type, str, str]]] = {
    "model (from scratch)": {
        "n_layer": (int, "L", "transformer blocks"),
        "n_head": (int, "H", "attention heads"),
        "n_embd": (int, "C", "width"),
        "block_size": (int, "T", "context in tokens; with --init at most that of the model"),
        "vocab_size": (int, "V", "tokens of the BPE"),
        "pattern": (str, "P", "split before BPE: han (default), gpt2, or a regular expression"),
        "dropout": (float, "P", "probability"),
    },
    "schedule": {
        "batch_size": (int, "B", "rows in a micro-batch"),
        "grad_accum": (int, "N", "micro-batches in a step"),
        "steps": (int, "N", "optimizer steps (default 5000, or no limit with --minutes)"),
        "minutes": (float, "M", "wall-clock time of the whole schedule"),
        "optimizer": (str, "NAME", "adamw, or muon for the matrices and adamw for the rest"),
        "lr": (float, "X", "peak learning rate"),
        "min_lr": (float, "X", "learning rate at the end (default: a tenth of --lr)"),
        "matrix_lr": (float, "X", "peak learning rate of muon (default: twice --lr)"),
        "warmup": (int, "N", "steps of linear warm-up"),
        "weight_decay": (float, "X", "of matrices"),
        "grad_clip": (float, "X", "largest norm of the gradient"),
        "seed": (int, "N", "of weights, order of the data, dropout and samples"),
    },
    "output and machine": {
        "eval_every": (int, "N", "steps between evaluations"),
        "eval_rows": (int, "N", "held-out rows per file and evaluation, at most"),
        "save_every": (int, "N", "steps between checkpoints"),
        "sample_every": (int, "N", "steps between samples"),
        "sample_prompt": (str, "TEXT", "what samples begin with"),
        "device": (str, "NAME", "of torch"),
        "threads": (int, "N", "of torch"),
        "precision": (str, "NAME", "auto, float32 or bfloat16 (autocast)"),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``gptx train``; one that is not given is None."""
    about_data = (
        "UTF-8 text, also .xz or .gz; lines that hold only <|endoftext|> separate documents"
    )
    about_init = "go on from a checkpoint, a .gptx file or 'demo'"
    about_mix = "weight of each file (default: by its tokens)"
    parser.add_argument("--data", nargs="+", metavar="FILE", help=about_data)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder of the model")
    parser.add_argument("--init", metavar="MODEL", help=about_init)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--mix", metavar="W,W,...", help=about_mix)
    defaults = {f.name: f.default for f in fields(TrainOptions) if f.default is not MISSING}
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (kind, metavar, text) in options.items():
            default = DEFAULT_SHAPE.get(name, defaults[name])
            shown = "" if default in (None, "") else f" (default {default})"
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, type=kind, metavar=metavar, help=text + shown)
    group.add_argument("--compile", action="store_true", default=None, help="use torch.compile")


def run(args: argparse.Namespace) -> int:
    """Runs ``gptx train`` with parsed arguments; returns the exit code.

    Raises:
        MissingExtraError: torch or tokenizers is not installed.
        GptxError, OSError: as `gptx.training.run.train`.
    """
    names = {field.name for field in fields(TrainOptions)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if "data" in given:
        given["data"] = tuple(given["data"])
    elif not args.resume:
        raise ParameterError("data", None, "at least one text file")
    if "mix" in given:
        given["mix"] = _weights(given["mix"])
    if not args.resume:
        options = TrainOptions(**given)
    _import_torch()
    from gptx.training.progress import Progress
    from gptx.training.run import resume, train

    progress = Progress(sys.stderr)
    try:
        if args.resume:
            return resume(args.out, given, progress)
        return train(options, progress)
    finally:
        progress.close()


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ParameterError("mix", text, "numbers separated by commas") from error


def _import_torch() -> None:
    # OpenMP threads that spin at barriers take a shared machine from each other: 2.3 times slower
    # steps were seen with one busy neighbour. It must be set before torch starts its threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for package in ("torch", "tokenizers"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError("gptx train", package, "train") from error
