"""Losses on held-out text, and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gptx.training.bpe import Encoder
from gptx.training.data import TokenSet
from gptx.training.loss import linear_cross_entropy
from gptx.training.model import GPT

_ROWS = 16
_SAMPLE_TOKENS = 100
_TEMPERATURE = 0.8
_TOP_K = 40


@dataclass(frozen=True)
class FileLoss:
    """Mean loss of one file: ``loss`` in nats per token over ``n_tokens``.

    ``nats_per_character`` covers the whole held-out text, and is None where only a part was scored.
    """

    name: str
    loss: float
    n_tokens: int
    nats_per_character: float | None


@dataclass(frozen=True)
class Evaluation:
    """Losses of the files that have held-out text, and their mean weighted by the mixture."""

    files: tuple[FileLoss, ...]
    loss: float

    def __str__(self) -> str:
        if not self.files:
            return "no held-out text"
        each = ", ".join(f"{math.exp(file.loss):.2f} {file.name}" for file in self.files)
        return f"held out {self.loss:.4f}; perplexity {each}"


@torch.no_grad()
def evaluate(
    model: GPT,
    token_sets: Sequence[TokenSet],
    mix: Sequence[float],
    block_size: int,
    max_rows: int | None = None,
) -> Evaluation:
    """Scores the held-out tokens of each file in rows that do not overlap, the last one shorter.

    Args:
        model: put into ``eval()`` mode.
        token_sets: the files; those with fewer than two held-out tokens are left out.
        mix: weight of each file in the mean.
        block_size: tokens in a row.
        max_rows: score only so many rows of each file; None scores every token.
    """
    model.eval()
    files, weights = [], []
    for token_set, weight in zip(token_sets, mix, strict=True):
        tokens = token_set.val.astype(np.int64)
        whole = max_rows is None or len(tokens) <= max_rows * block_size + 1
        if not whole:
            tokens = tokens[: max_rows * block_size + 1]  # type: ignore[operator]
        n_tokens = len(tokens) - 1
        if n_tokens < 1:
            continue
        total = _total_loss(model, tokens, block_size)
        per_character = total / token_set.val_characters if whole else None
        files.append(FileLoss(token_set.name, total / n_tokens, n_tokens, per_character))
        weights.append(weight)
    if not files:
        return Evaluation((), math.inf)
    return Evaluation(tuple(files), float(np.average([f.loss for f in files], weights=weights)))


def _total_loss(model: GPT, tokens: np.ndarray, block_size: int) -> float:
    """Sum of the losses of ``tokens[1:]``, in nats."""
    n_rows, rest = divmod(len(tokens) - 1, block_size)
    rows = [(i * block_size, min(_ROWS, n_rows - i), block_size) for i in range(0, n_rows, _ROWS)]
    rows += [(n_rows * block_size, 1, rest)] if rest else []
    device, total = model.wte.weight.device, 0.0
    for start, n, length in rows:
        part = torch.from_numpy(tokens[start : start + n * length + 1]).to(device)
        x = model.hidden(part[:-1].view(n, length)).flatten(0, 1)
        total += linear_cross_entropy(x, model.head_weight, part[1:]).item() * n * length
    return total


@torch.no_grad()
def sample(model: GPT, encoder: Encoder, prompt: str, *, seed: int) -> str:
    """The prompt and its continuation by up to 100 tokens, at temperature 0.8 and top-k 40.

    Draws from a generator of its own, so that a run with samples is the run without them.
    """
    model.eval()
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    start = encoder.start_ids or [0]
    ids = start + (encoder.encode_batch([prompt])[0] if prompt else [])
    for _ in range(_SAMPLE_TOKENS):
        window = torch.tensor([ids[-model.config.block_size :]], device=device)
        last = model.hidden(window)[0, -1]
        logits = (model.head_weight @ last).float().cpu()[: encoder.n_vocab] / _TEMPERATURE
        best, indices = logits.topk(min(_TOP_K, encoder.n_vocab))
        drawn = int(indices[torch.multinomial(best.softmax(0), 1, generator=generator)])
        if drawn == encoder.eot_id:
            break
        ids.append(drawn)
    return encoder.decode(ids[len(start) :])
