"""How good a model is: tasks of the lm-evaluation-harness, and figures of any text without it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptx import requests, scoring
from gptx.errors import ParameterError

if TYPE_CHECKING:
    from gptx.model import Model

__all__ = ["TextFigures", "evaluate_tasks", "evaluate_text"]

_WORD = re.compile(r"\s([^\W\d_]{2,})\W*$")
_LEAST_CONTEXT = 4  # words in front of the one to guess


class TextFigures(NamedTuple):
    """What `evaluate_text` finds.

    Attributes:
        perplexity: per token; of another tokenizer it is another figure.
        bits_per_byte: of the same text in UTF-8; comparable between tokenizers.
        tokens, bytes: how long the text is.
        last_words: how many paragraphs have a last word to guess.
        last_word_accuracy: the share that greedy decoding guesses; NaN where there are none.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    last_words: int
    last_word_accuracy: float


def evaluate_text(
    model: Model, text: str, *, stride: int | None = None, limit: int | None = None
) -> TextFigures:
    """Perplexity of a text of any length, and how often the model guesses the last word of a
    paragraph, as in LAMBADA (Paperno et al., 2016).

    Args:
        model: one with a tokenizer.
        text: at least two tokens; paragraphs are separated by empty lines.
        stride: as for `Model.perplexity`.
        limit: guess at most so many last words. A word has two letters or more and four words in
            front of it; of a paragraph too long the end is taken.

    Raises:
        ParameterError: an argument is out of range.
    """
    if not isinstance(text, str):
        raise ParameterError("text", text, "a str")
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ParameterError("limit", limit, "an integer from 0")
    bos = bool(requests.eos_token_ids(model))
    perplexity = model.perplexity(text, stride=stride, bos=bos)
    tokens = len(model.tokenizer.encode(text))
    size = len(text.encode())
    bits = math.log2(perplexity) * (tokens if bos else tokens - 1) / size
    groups = _last_words(model, text)[:limit]
    scores = scoring.behind(model, groups)
    right = [bool((found[0].ranks == 0).all()) for found in scores]
    accuracy = float(np.mean(right)) if right else math.nan
    return TextFigures(perplexity, bits, tokens, size, len(right), accuracy)


def _last_words(model: Model, text: str) -> list[tuple[list[Any], int]]:
    """Of each paragraph its ids up to the end of its last word, and how many stand before that."""
    groups: list[tuple[list[Any], int]] = []
    for paragraph in re.split(r"\n\s*\n", text):
        match = _WORD.search(paragraph)
        if match is None or len(paragraph[: match.start()].split()) < _LEAST_CONTEXT:
            continue
        context = model.tokenizer.encode(paragraph[: match.start()])
        ids = model.tokenizer.encode(paragraph[: match.end(1)])
        # A token may reach over the border; it is guessed too.
        pairs = zip(context, ids, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(context))
        cut = max(0, len(ids) - model.config.block_size - 1)
        if shared > cut:
            groups.append(([np.array(ids[cut:], np.int32)], shared - cut))
    return groups


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Runs tasks of the lm-evaluation-harness.

    Args:
        model: one with a tokenizer.
        tasks: their names.
        include_path: a folder of further tasks; those that come with the harness need the network.
        limit: of each task only so many documents, or below 1 this share of them.
        num_fewshot: examples in front of each question; default what the task says.
        **more: further arguments of ``lm_eval.simple_evaluate``.

    Returns:
        What ``lm_eval.simple_evaluate`` returns; ``["results"][task]`` has the figures.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ParameterError: an argument is out of range, or there is no such task.
    """
    from gptx.integrations.lm_eval import GptxLM

    if isinstance(tasks, str) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise ParameterError("tasks", tasks, "a sequence of at least one name")
    if limit is not None and not 0 < limit < math.inf:
        raise ParameterError("limit", limit, "a number of documents, or a share below 1")
    if num_fewshot is not None and (type(num_fewshot) is not int or num_fewshot < 0):
        raise ParameterError("num_fewshot", num_fewshot, "an integer from 0")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = None
    if include_path is not None:  # the index of the harness's own tasks takes seconds
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ParameterError("tasks", unknown[0], "the name of a task; see lm-eval ls tasks")
    if limit is not None and limit >= 1:
        limit = int(limit)
    options = {"limit": limit, "num_fewshot": num_fewshot, "log_samples": False} | more
    return simple_evaluate(model=GptxLM(model), tasks=list(tasks), task_manager=manager, **options)
