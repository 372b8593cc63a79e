"""The shape of a GPT-2: what a checkpoint, a model file and the core agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from gptx.errors import ParameterError

ACTIVATIONS = ("gelu_new", "gelu", "relu")
"""gelu_new is GPT-2's tanh form, gelu the exact erf form (nanoGPT since 2023)."""

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
"""What the outputs of a classification head mean, names as in transformers: one of the labels holds
(softmax), each may hold (sigmoid), numbers as they are.
"""

HEAD_FIELDS = ("labels", "problem_type")
"""Fields that only the config of a model with a classification head has, as plain values."""

_MAX_DIM = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Hyperparameters of a GPT-2 (Radford et al., 2019), names as in nanoGPT and transformers.

    Attributes:
        vocab_size: V, number of token ids.
        block_size: context length in tokens (transformers: ``n_positions``).
        n_layer: L, number of transformer blocks.
        n_head: H; divides ``n_embd``.
        n_embd: C, width of the residual stream.
        n_inner: F, width of the MLP, usually ``4 * n_embd``.
        activation: one of ``ACTIVATIONS``.
        layer_norm_epsilon: added to the variance inside the square root.
        scale_attn_weights: divide the attention scores by ``sqrt(n_embd / n_head)``.
        scale_attn_by_inverse_layer_idx: divide them by ``layer + 1`` as well.
        tie_word_embeddings: ``lm_head`` is ``wte``.
        labels: of a classification head, distinct names in the order of its outputs; empty: none.
        problem_type: one of ``PROBLEM_TYPES`` where there are labels, else empty.

    Raises:
        ParameterError: a field is outside its range.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    activation: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    labels: tuple[str, ...] = ()
    problem_type: str = ""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_DIM:
                raise ParameterError(name, value, f"an integer from 1 to {_MAX_DIM}")
        if self.n_embd % self.n_head:
            raise ParameterError("n_head", self.n_head, f"a divisor of n_embd = {self.n_embd}")
        if self.activation not in ACTIVATIONS:
            raise ParameterError("activation", self.activation, "one of " + ", ".join(ACTIVATIONS))
        eps = self.layer_norm_epsilon
        if type(eps) is not float or not (math.isfinite(eps) and 0 < eps < 1):
            raise ParameterError("layer_norm_epsilon", eps, "a float between 0 and 1")
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
        ):
            if type(getattr(self, name)) is not bool:
                raise ParameterError(name, getattr(self, name), "true or false")
        if not _is_labels(self.labels):
            raise ParameterError("labels", self.labels, "distinct texts that are not empty")
        allowed_types = PROBLEM_TYPES if self.labels else ("",)
        if self.problem_type not in allowed_types:
            allowed = "one of " + ", ".join(PROBLEM_TYPES) if self.labels else "none without labels"
            raise ParameterError("problem_type", self.problem_type, allowed)

    @property
    def head_size(self) -> int:
        """D = n_embd / n_head."""
        return self.n_embd // self.n_head

    @property
    def n_params(self) -> int:
        """Number of weights, biases included, a tied lm_head counted once."""
        c, f = self.n_embd, self.n_inner
        block = 4 * c * c + 4 * c + 2 * c * f + f + c + 4 * c
        heads = (1 if self.tie_word_embeddings else 2) * self.vocab_size + len(self.labels)
        return heads * c + self.block_size * c + self.n_layer * block + 2 * c

    def to_dict(self) -> dict[str, object]:
        """Plain values, in field order; ``HEAD_FIELDS`` only where there are labels."""
        values = asdict(self) | {"labels": list(self.labels)}
        return {k: v for k, v in values.items() if self.labels or k not in HEAD_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> GPTConfig:
        """The inverse of `to_dict`: every field present, no other key."""
        head = any(name in values for name in HEAD_FIELDS)
        names = [f.name for f in fields(cls) if head or f.name not in HEAD_FIELDS]
        for name in names:
            if name not in values:
                raise ParameterError(name, None, "a value in the config")
        for name in values:
            if name not in names:
                raise ParameterError("config", name, "one of " + ", ".join(names))
        values = dict(values)
        if head:
            labels = values["labels"]
            if type(labels) is not list or not labels:
                raise ParameterError("labels", labels, "a list of at least one text")
            values["labels"] = tuple(labels)
        return cls(**values)  # type: ignore[arg-type]


def _is_labels(labels: object) -> bool:
    """A tuple of distinct texts, none of them empty, all with an encoding."""
    if type(labels) is not tuple or not all(type(text) is str and text for text in labels):
        return False
    try:
        "".join(labels).encode()
    except UnicodeEncodeError:
        return False
    return len(set(labels)) == len(labels)
