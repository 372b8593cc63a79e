"""Recipes: what a language model can be asked to do by a prompt alone (Radford et al., 2019).

>>> gptx.tasks.classify("A wonderful film.", ["bad", "good"], model="gpt2.gptx").label
>>> gptx.tasks.translate("Where is the king?", to="French", model="gpt2.gptx")

Each is a prompt around `Model.generate` or the scores of `Model.choose`, nothing more; how well it
works is the model's affair. ``model`` is a `Model`, a path, or None for the default of
`gptx.generate`. A list of texts is one batch, whose results are those of the texts alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gptx import scoring
from gptx.classification import Classification, classification
from gptx.errors import ContextLengthError, ParameterError
from gptx.generation import Generation
from gptx.loading import resolve
from gptx.model import Model

__all__ = ["answer", "classify", "summarize", "translate"]

TEMPLATE = "Text: {text}\nLabel: {label}"
NEUTRAL = "N/A"

_PHRASES = {
    "English": ("Good morning.", "Where is the king?", "I like this house."),
    "French": ("Bonjour.", "Où est le roi ?", "J'aime cette maison."),
    "German": ("Guten Morgen.", "Wo ist der König?", "Ich mag dieses Haus."),
    "Italian": ("Buongiorno.", "Dov'è il re?", "Mi piace questa casa."),
    "Spanish": ("Buenos días.", "¿Dónde está el rey?", "Me gusta esta casa."),
    "Chinese": ("早上好。", "国王在哪里？", "我喜欢这座房子。"),
}
_QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("Who wrote Hamlet?", "William Shakespeare"),
    ("How many legs does a spider have?", "Eight"),
)
_TLDR = "\nTL;DR:"
_GAP = " ... "
_SENTENCE = re.compile(r"[.!?][\"')\]]*(?=\s)|[。！？][”’」』]*")

AnyModel = str | os.PathLike[str] | Model | None
Pairs = Sequence[tuple[str, str]]


def classify(
    texts: str | Sequence[str],
    labels: Sequence[str] | Mapping[str, str],
    *,
    model: AnyModel = None,
    template: str = TEMPLATE,
    examples: Pairs = (),
    normalize: str = "sum",
    calibrate: bool | str = False,
) -> Classification | list[Classification]:
    """The label that most likely follows a text, or each of a list of texts.

    Args:
        texts: a str, or a list of them.
        labels: at least two; a mapping says how each is worded in the prompt: {"pos": "great"}.
        model: see the module.
        template: what the model reads, with {text} once and {label} once, at the end.
        examples: (text, label) pairs in front, written with the template, an empty line between
            them: few-shot (Brown et al., 2020).
        normalize: compare the "sum" of the log-probabilities of a label's tokens, their "mean", or
            the sum for each of its UTF-8 "bytes".
        calibrate: subtract the score that a label has behind a neutral text, "N/A" or the one
            given here: it takes out what the model prefers anyway (Zhao et al., 2021).

    Returns:
        A `Classification`, or a list of them: ``probabilities`` is the softmax of the scores over
        these labels, ``logits`` the scores, float64 ``[n_labels]``. The examples and each text are
        computed once for all labels.

    A text too long for the context loses its middle, for which " ... " stands.

    Raises:
        ParameterError: an argument is out of its range.
        ContextLengthError: labels and examples leave no room for a text.
        Others: as `Model.choose`.
    """
    wordings = _wordings(labels)
    before, middle = _template(template)
    shots = _pairs("examples", examples)
    for _, label in shots:
        if label not in wordings:
            raise ParameterError("examples", label, f"labels among {', '.join(wordings)}")
    if normalize not in ("sum", "mean", "bytes"):
        raise ParameterError("normalize", normalize, "one of 'sum', 'mean', 'bytes'")
    if not isinstance(calibrate, bool | str) or calibrate == "":
        raise ParameterError("calibrate", calibrate, "True, False or a neutral text")
    batch = _texts("texts", texts)
    model = resolve(model)

    # A space in front of a label belongs to its first token.
    start = middle.rstrip(" ")
    options = [middle[len(start) :] + wording for wording in wordings.values()]
    intro = "".join(f"{before}{text}{middle}{wordings[label]}\n\n" for text, label in shots)
    encode = model.tokenizer.encode
    # One token more than the context can be scored; one may be split off at the border.
    room = model.config.block_size - max(len(encode(option)) for option in options)

    def prompt(text: str) -> str:
        return f"{intro}{before}{text}{start}"

    remedy = "use fewer or shorter examples"
    cut = [_cut(model, text, lambda t: len(encode(prompt(t))), room, remedy) for text in batch]
    if calibrate:
        cut.append(NEUTRAL if calibrate is True else calibrate)
    found = scoring.given(model, [(prompt(text), options) for text in cut], bos=False)
    scores = [scoring.chosen(model, options, each, normalize).scores for each in found]
    prior = scores.pop() if calibrate else np.zeros(len(options))
    results = [classification(list(wordings), row - prior) for row in scores]
    return results[0] if isinstance(texts, str) else results


def translate(
    text: str | Sequence[str],
    *,
    to: str,
    source: str = "English",
    examples: Pairs | None = None,
    model: AnyModel = None,
    detail: bool = False,
    **params: Any,
) -> str | Generation | list[str] | list[Generation]:
    """The text in another language, up to the end of the line: few-shot.

    Args:
        text: a str, or a list of them; line breaks become spaces.
        to, source: languages by their English names.
        examples: (source, translation) pairs; default three short ones for English, French, German,
            Italian, Spanish and Chinese, else none.
        model: see the module.
        detail: return each `Generation` instead of its text.
        **params: fields of `gptx.SamplingParams`; default greedy, ``max_new_tokens`` 64 but at most
            half of the context, and ``stop`` a line break.

    Raises:
        ParameterError: an argument is out of its range.
        ContextLengthError: the prompt does not fit; a part of a text would not be its translation.
        Others: as `Model.generate`.
    """
    for name, value in (("to", to), ("source", source)):
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise ParameterError(name, value, "the name of a language")
    if examples is None:
        known = source in _PHRASES and to in _PHRASES
        examples = list(zip(_PHRASES[source], _PHRASES[to], strict=True)) if known else []
    shots = _pairs("examples", examples)
    intro = "".join(f"{source}: {a}\n{to}: {b}\n\n" for a, b in shots)
    batch = [" ".join(line.split()) for line in _texts("text", text)]
    model = resolve(model)
    prompts = [f"{intro}{source}: {line}\n{to}:" for line in batch]
    values = _defaults(model, 64, stop="\n") | params
    for prompt in prompts:
        _check_room(model, prompt, values)
    results = _generated(model, prompts, values)
    return _returned(text, results, detail)


def answer(
    question: str | Sequence[str],
    *,
    context: str | None = None,
    examples: Pairs | None = None,
    model: AnyModel = None,
    detail: bool = False,
    **params: Any,
) -> str | Generation | list[str] | list[Generation]:
    """The answer to a question, or to each of a list, up to the end of the line.

    Args:
        question: a str, or a list of them; line breaks become spaces.
        context: a text that the questions are about. If it is too long for the model's context it
            loses its middle, for which " ... " stands.
        examples: (question, answer) pairs in front; default three without a context, none with one.
        model: see the module.
        detail: return each `Generation` instead of its text.
        **params: fields of `gptx.SamplingParams`; default greedy, ``max_new_tokens`` 32 but at most
            half of the context, and ``stop`` a line break.

    Raises:
        ParameterError: an argument is out of its range.
        ContextLengthError: question and examples do not fit.
        Others: as `Model.generate`.
    """
    if context is not None and (not isinstance(context, str) or not context.strip()):
        raise ParameterError("context", context, "a text, or None")
    if examples is None:
        examples = _QUESTIONS if context is None else ()
    shots = _pairs("examples", examples)
    intro = "".join(f"Q: {q}\nA: {a}\n\n" for q, a in shots)
    batch = [" ".join(line.split()) for line in _texts("question", question)]
    model = resolve(model)
    values = _defaults(model, 32, stop="\n") | params
    prompts = []
    for line in batch:
        if context is None:
            prompts.append(f"{intro}Q: {line}\nA:")
            _check_room(model, prompts[-1], values)
        else:
            prompts.append(_around(model, intro, context, f"\n\nQ: {line}\nA:", values))
    results = _generated(model, prompts, values)
    return _returned(question, results, detail)


def summarize(
    text: str | Sequence[str],
    *,
    sentences: int | None = 3,
    model: AnyModel = None,
    detail: bool = False,
    **params: Any,
) -> str | Generation | list[str] | list[Generation]:
    """What follows a text and "TL;DR:", as in the paper on GPT-2 (Radford et al., 2019, 3.6).

    Args:
        text: a str, or a list of them. One too long for the context loses its middle, for which
            " ... " stands.
        sentences: return the first so many, 3 as in the paper; None: all.
        model: see the module.
        detail: return each whole `Generation` instead.
        **params: fields of `gptx.SamplingParams`; default as in the paper ``max_new_tokens`` 100,
            but at most half of the context, and sampling among the ``top_k`` 2 most likely tokens;
            ``temperature=0`` is greedy.

    Raises:
        ParameterError: an argument is out of its range.
        ContextLengthError: there is no room for a text.
        Others: as `Model.generate`.
    """
    if sentences is not None and (type(sentences) is not int or sentences < 1):
        raise ParameterError("sentences", sentences, "an integer from 1, or None")
    batch = _texts("text", text)
    model = resolve(model)
    values = _defaults(model, 100, temperature=1.0, top_k=2, top_p=1.0) | params
    prompts = [_around(model, "", part.rstrip(), _TLDR, values) for part in batch]
    results = _generated(model, prompts, values)
    return _returned(text, results, detail, lambda found: _first(found, sentences))


def _wordings(labels: object) -> dict[str, str]:
    """label -> its wording."""
    allowed = "at least two different texts, or a mapping of labels to such"
    if isinstance(labels, str) or not isinstance(labels, Sequence | Mapping):
        raise ParameterError("labels", labels, allowed)
    pairs = list(labels.items()) if isinstance(labels, Mapping) else [(x, x) for x in labels]
    if not all(isinstance(text, str) and text.strip() for pair in pairs for text in pair):
        raise ParameterError("labels", labels, allowed)
    if len(pairs) < 2 or len({a for a, _ in pairs}) < len(pairs):
        raise ParameterError("labels", labels, allowed)
    if len({b for _, b in pairs}) < len(pairs):
        raise ParameterError("labels", labels, allowed)
    return dict(pairs)


def _template(template: str) -> tuple[str, str]:
    """What stands in front of the text, and between the text and the label."""
    allowed = "a text with {text} once and {label} once, at the end"
    if not isinstance(template, str):
        raise ParameterError("template", template, allowed)
    before, _, rest = template.partition("{text}")
    middle, _, after = rest.partition("{label}")
    once = template.count("{text}") == template.count("{label}") == 1
    if not once or "{label}" in before or after.strip() or not middle:
        raise ParameterError("template", template, allowed)
    return before, middle


def _pairs(name: str, pairs: object) -> list[tuple[str, str]]:
    allowed = "pairs of texts"
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise ParameterError(name, pairs, allowed)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ParameterError(name, pair, allowed)
        if not all(isinstance(text, str) for text in pair):
            raise ParameterError(name, pair, allowed)
    return [(a, b) for a, b in pairs]


def _texts(name: str, texts: object) -> list[str]:
    batch = [texts] if isinstance(texts, str) else texts
    if not isinstance(batch, Sequence) or isinstance(batch, bytes):
        raise ParameterError(name, texts, "a text, or a list of texts")
    for text in batch:
        if not isinstance(text, str) or not text.strip():
            raise ParameterError(name, text, "texts that are not empty")
    return list(batch)


def _cut(model: Model, text: str, size: Callable[[str], int], room: int, remedy: str) -> str:
    """The text, or where its size is above ``room`` tokens, its beginning and its end."""
    over = size(text) - room
    if over <= 0:
        return text
    ids = model.tokenizer.encode(text)
    keep = len(ids) - over
    while keep >= 2:
        # Half a character at the cut is left out.
        first = model._decode(ids[: keep - keep // 2]).rstrip("\ufffd")
        last = model._decode(ids[len(ids) - keep // 2 :]).lstrip("\ufffd")
        shorter = f"{first}{_GAP}{last}"
        over = size(shorter) - room
        if over <= 0:
            return shorter
        keep -= over
    raise ContextLengthError(size(text), max(room, 0), remedy)


def _around(model: Model, before: str, text: str, behind: str, values: Mapping[str, Any]) -> str:
    """A prompt in which the text is cut so that there is room to generate."""

    def prompt(part: str) -> str:
        return f"{before}{part}{behind}"

    def size(part: str) -> int:
        return len(model.tokenizer.encode(prompt(part)))

    remedy = "use a smaller max_new_tokens, a shorter question or fewer examples"
    return prompt(_cut(model, text, size, _room(model, values), remedy))


def _check_room(model: Model, prompt: str, values: Mapping[str, Any]) -> None:
    have, room = len(model.tokenizer.encode(prompt)), _room(model, values)
    if have > room:
        remedy = "shorten the text, use fewer examples or a smaller max_new_tokens"
        raise ContextLengthError(have, room, remedy)


def _room(model: Model, values: Mapping[str, Any]) -> int:
    """Tokens of a prompt at most, so that ``max_new_tokens`` fit behind it."""
    length = values["max_new_tokens"]
    size = model.config.block_size
    if type(length) is not int or not 1 <= length < size:
        allowed = f"an integer from 1 to {size - 1}, to leave room for a prompt"
        raise ParameterError("max_new_tokens", length, allowed)
    return size - length


def _defaults(model: Model, length: int, **values: Any) -> dict[str, Any]:
    half = max(1, model.config.block_size // 2)
    return {"max_new_tokens": min(length, half), "temperature": 0.0} | values


def _generated(model: Model, prompts: list[str], values: dict[str, Any]) -> list[Generation]:
    results = model.generate(prompts, **values) if prompts else []
    assert isinstance(results, list)
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def _returned(
    given: str | Sequence[str],
    results: list[Generation],
    detail: bool,
    shape: Callable[[str], str] = str.strip,
) -> str | Generation | list[str] | list[Generation]:
    if detail:
        return results[0] if isinstance(given, str) else results
    texts = [shape(result.text) for result in results]
    return texts[0] if isinstance(given, str) else texts


def _first(text: str, sentences: int | None) -> str:
    """The first sentences of a text, all where there are fewer."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    if sentences is None or len(ends) < sentences:
        return text
    return text[: ends[sentences - 1]]
