"""What rounding costs: perplexity, KL divergence and top-1 agreement of every precision.

    python bench/quality.py --model demo-folder --text tales.txt.xz poems.txt.xz
    python bench/quality.py --shape gpt2        random weights: the error of the logits alone

The model is any float32 checkpoint that gptx reads. It is stored as float32, bfloat16 and int8, and
the held-out documents of the texts (one in a hundred, chosen by hash, as `gptx train` does) are
scored in rows of the context. Every precision sees the same tokens. KL is of the probabilities
after each token from those of float32, in nats; "int8 weights, float32 math" tells the loss of
storing int8 from the loss of computing with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gptx
import machine
import workloads
from gptx import modelfile
from gptx.convert import convert_in_memory
from gptx.training.data import END_OF_TEXT, read_documents, split_documents

# Name, dtype of the file, precision of the products.
MODES = (
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("int8 weights, float32 math", "int8", "float32"),
    ("int8", "int8", "int8"),
    ("int8-fast", "int8", "int8-fast"),
)


@dataclass
class Score:
    """Sums over tokens for one precision."""

    tokens: int = 0
    loss: float = 0.0  # nats
    kl: float = 0.0  # nats
    agreed: int = 0  # the same most likely token as float32
    squares: float = 0.0  # of the differences of the logits from float32's, mean over V
    largest: float = 0.0  # of those differences

    def add(self, logits: np.ndarray, reference: np.ndarray, targets: np.ndarray | None) -> None:
        """logits, reference [T, V] float64; targets [T] the tokens that followed, or None."""
        log_p, log_q = log_softmax(reference), log_softmax(logits)
        self.tokens += len(logits)
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        self.agreed += int((logits.argmax(1) == reference.argmax(1)).sum())
        self.squares += float(((logits - reference) ** 2).mean(1).sum())
        self.largest = max(self.largest, float(np.abs(logits - reference).max()))
        if targets is not None:
            self.loss -= float(log_q[np.arange(len(targets)), targets].sum())

    def figures(self) -> dict[str, float]:
        return {
            "perplexity": float(np.exp(self.loss / self.tokens)),
            "mean_kl": self.kl / self.tokens,
            "top1_agreement": self.agreed / self.tokens,
            "logit_rms_error": (self.squares / self.tokens) ** 0.5,
            "logit_max_error": self.largest,
            "tokens": self.tokens,
        }


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(prefix="gptx-quality-") as folder:
        models = load_models(options, Path(folder))
        texts = token_rows(options, models["float32"])
        results = {name: score(models, rows, bool(options.text)) for name, rows in texts.items()}
    if options.json:
        report = {
            "machine": machine.describe_machine(),
            "versions": machine.describe_versions(),
            "model": str(options.model.name) if options.model else options.shape,
            "texts": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results, bool(options.text)))
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="a float32 checkpoint with a tokenizer")
    model.add_argument("--shape", choices=workloads.SHAPES, help="random weights instead")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="UTF-8, .xz or .gz")
    parser.add_argument("--tokens", type=int, default=20_000, help="most tokens of each text")
    parser.add_argument("--isa", help="kernels to use; default the best")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(argv)
    if options.model and not options.text:
        parser.error("--model needs --text")
    if options.tokens < 2:
        parser.error(f"--tokens: expected at least 2, got {options.tokens}")
    return options


def load_models(options: argparse.Namespace, folder: Path) -> dict[str, gptx.Model]:
    """One model for each mode, all of the same float32 weights."""
    tokenizer = None
    if options.model:
        source = convert_in_memory(options.model)
        config, tokenizer = source.config, source.tokenizer
        tensors = {name: source.weight(name) for name in modelfile.canonical_shapes(config)}
    else:
        config = workloads.config_named(options.shape)
        tensors = workloads.RandomTensors(config)
    for dtype in modelfile.DTYPES:
        path = folder / f"{dtype}.gptx"
        modelfile.write(path, config, tensors, dtype=dtype, tokenizer=tokenizer)
    return {
        name: gptx.load(folder / f"{dtype}.gptx", precision=precision, isa=options.isa)
        for name, dtype, precision in MODES
    }


def token_rows(options: argparse.Namespace, model: gptx.Model) -> dict[str, list[np.ndarray]]:
    """For each text the rows [<= block_size + 1] that are scored; random ids without a text."""
    if not options.text:
        rng = np.random.default_rng(0)
        return {"random ids": [rng.integers(0, model.config.vocab_size, 257) for _ in range(2)]}
    return {path.name: list(rows_of(path, model, options.tokens)) for path in options.text}


def rows_of(path: Path, model: gptx.Model, limit: int) -> Iterator[np.ndarray]:
    """Held-out documents, each started by the end token, cut into rows that share one token."""
    _, held_out = split_documents(read_documents(path))
    start = model.tokenizer.encode(END_OF_TEXT, allow_special=True)
    size, scored = model.config.block_size, 0
    for document in held_out:
        ids = np.array([*start, *model.tokenizer.encode(document)])
        for begin in range(0, len(ids) - 1, size):
            row = ids[begin : begin + size + 1][: limit - scored + 1]
            if len(row) < 2:
                return
            scored += len(row) - 1
            yield row


def score(
    models: dict[str, gptx.Model], rows: list[np.ndarray], with_loss: bool
) -> dict[str, dict[str, float]]:
    scores = {name: Score() for name in models}
    for row in rows:
        reference = models["float32"].logits(row[:-1]).astype(float)
        for name, model in models.items():
            logits = reference if name == "float32" else model.logits(row[:-1]).astype(float)
            scores[name].add(logits, reference, row[1:] if with_loss else None)
    return {name: result.figures() for name, result in scores.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def table(results: dict[str, dict[str, dict[str, float]]], with_loss: bool) -> str:
    perplexity = "perplexity | change | " if with_loss else ""
    lines = []
    for text, scores in results.items():
        tokens = scores["float32"]["tokens"]
        lines += [
            f"| {text}, {tokens} tokens | {perplexity}mean KL | top-1 agreement | logits, RMS |",
            "|---" * (6 if with_loss else 4) + "|",
        ]
        base = scores["float32"]["perplexity"]
        for name, f in scores.items():
            loss = ""
            if with_loss:
                loss = f"{f['perplexity']:.3f} | {100 * (f['perplexity'] / base - 1):+.3f} % | "
            lines.append(
                f"| {name} | {loss}{f['mean_kl']:.1e} | {100 * f['top1_agreement']:.2f} % | "
                f"{f['logit_rms_error']:.1e} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
