"""What a text is: the labels of a classification head, or of any other scores.

A head is that of transformers' ``GPT2ForSequenceClassification``: one linear layer on the hidden
state of the last token, which has read all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptx import scoring
from gptx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from gptx.errors import UnsupportedError
from gptx.modelfile import CLASS_HEAD

if TYPE_CHECKING:
    from gptx.model import Model, Prompt

_HOLDS = 0.5  # probability from which one of several labels holds


@dataclass(frozen=True, eq=False)
class Classification:
    """The labels of a text. ``str()`` of it is the label.

    Attributes:
        label: the most likely one; of a regression its only name.
        probabilities: label -> probability: of labels of which one holds they sum to 1 (softmax),
            of labels that may all hold each is on its own (sigmoid); of a regression the values.
        labels: those that hold: the label, or all with a probability of at least 0.5.
        logits: ``[n_labels]`` in the order of the labels, what the probabilities were made of:
            float32 of a head, float64 log-probabilities of `gptx.tasks.classify`.
    """

    label: str
    probabilities: dict[str, float]
    labels: tuple[str, ...]
    logits: NDArray[np.float32] | NDArray[np.float64]

    def __str__(self) -> str:
        return self.label


def classification(
    labels: Sequence[str],
    logits: NDArray[np.float32] | NDArray[np.float64],
    problem_type: str = SINGLE_LABEL,
) -> Classification:
    """What logits ``[n_labels]`` say, for one of `gptx.config.PROBLEM_TYPES`."""
    values = logits.astype(np.float64)
    if problem_type == SINGLE_LABEL:
        values = np.exp(values - values.max())
        values /= values.sum()
    elif problem_type == MULTI_LABEL:
        values = np.exp(-np.logaddexp(0.0, -values))
    label = labels[int(np.argmax(logits))]
    held: tuple[str, ...] = (label,)
    if problem_type == MULTI_LABEL:
        held = tuple(x for x, p in zip(labels, values, strict=True) if p >= _HOLDS)
    elif problem_type == REGRESSION:
        held = tuple(labels)
    return Classification(label, dict(zip(labels, values.tolist(), strict=True)), held, logits)


def class_logits(model: Model, texts: Sequence[Prompt]) -> NDArray[np.float32]:
    """The outputs of the head, float32 ``[n, n_labels]``.

    Padding behind a text, where the model knows such a token, is not read, as in transformers.

    Raises:
        UnsupportedError: the model has no head.
    """
    if not model.config.labels:
        raise UnsupportedError(
            f"{model.path.name}: expected a model with a classification head, got one without; "
            "gptx.tasks.classify asks any model"
        )
    head = model._source.weight(CLASS_HEAD).astype(np.float64)
    states = scoring.embed(model, _unpadded(model, texts), pooling="last", normalize=False)
    out = np.empty((len(texts), len(head)), np.float32)
    for row, state in zip(out, states, strict=True):
        # Text by text, so that a sum does not depend on how many there are.
        row[:] = (head * state).sum(axis=1)
    return out


def _unpadded(model: Model, texts: Sequence[Prompt]) -> list[NDArray[np.int32]]:
    pad = model._source.generation.get("pad_token_id")
    result = []
    for text in texts:
        ids = model._ids(text)
        kept = np.flatnonzero(ids != pad)
        # Of nothing but padding transformers takes the first token.
        result.append(ids[: int(kept[-1]) + 1 if len(kept) else 1])
    return result
