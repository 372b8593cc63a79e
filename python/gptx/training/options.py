"""What a training run is asked to do: plain values, checked, and stored with every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from gptx.errors import ParameterError

DEFAULT_SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 8192}
"""The model that is trained from scratch where an option says nothing: 14 M parameters."""

CHANGEABLE = frozenset(
    (
        *("steps", "minutes", "device", "threads"),
        *("eval_every", "save_every", "sample_every", "sample_prompt"),
    )
)
"""Options that a resumed run may change; every other one would make it a different run."""

_DEFAULT_STEPS = 5000
_AT_LEAST_ONE = (
    *DEFAULT_SHAPE,
    *("batch_size", "grad_accum", "steps", "threads"),
    *("eval_every", "eval_rows", "save_every", "sample_every"),
)
_POSITIVE = ("minutes", "lr", "matrix_lr", "grad_clip")
_NOT_NEGATIVE = ("min_lr", "weight_decay")
_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "precision": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run.

    Attributes:
        data: text files (UTF-8; ``.xz`` and ``.gz`` are unpacked).
        out: folder of the checkpoint and of the model.
        init: a checkpoint to go on from, ``"demo"`` for the built-in model, None from scratch.
        n_layer, n_head, n_embd, block_size, vocab_size: shape; None means `DEFAULT_SHAPE`, or that
            of ``init``. With ``init`` a smaller block_size trains on shorter rows.
        pattern: how text is split before BPE: ``"han"``, ``"gpt2"`` or a regular expression.
        mix: weight of each file in the training rows; None: in proportion to their tokens.
        batch_size: rows in a micro-batch.
        grad_accum: micro-batches in a step.
        steps: optimizer steps; None: 5000, or unlimited where ``minutes`` is given.
        minutes: wall-clock time of the schedule; the run ends at the first of the two.
        lr: peak learning rate; min_lr: its value at the end, None is ``lr / 10``.
        warmup: steps over which the rate rises from zero.
        optimizer: ``"adamw"``, or ``"muon"``: Muon for the matrices of the blocks, AdamW elsewhere.
        matrix_lr: peak rate of Muon, None is ``2 * lr``.
        weight_decay: of matrices; vectors have none.
        grad_clip: largest norm of the gradient.
        dropout: probability.
        seed: of initial weights, order of the data, dropout and samples.
        eval_every, save_every, sample_every: steps between; eval_rows: rows per file at most.
        sample_prompt: what samples begin with; "" is the start of a document.
        device: of torch; "auto" is cuda where there is one.
        threads: of torch; None leaves its choice.
        precision: "auto" takes bfloat16 where a matrix product is measurably faster in it.
        compile: run the model through torch.compile.

    Raises:
        ParameterError: a value is outside its range.
    """

    data: tuple[str, ...]
    out: str
    init: str | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None
    vocab_size: int | None = None
    pattern: str | None = None
    mix: tuple[float, ...] | None = None
    batch_size: int = 64
    grad_accum: int = 1
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    min_lr: float | None = None
    warmup: int = 100
    optimizer: str = "adamw"
    matrix_lr: float | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    dropout: float = 0.1
    seed: int = 1
    eval_every: int = 250
    eval_rows: int = 200
    save_every: int = 250
    sample_every: int = 500
    sample_prompt: str = ""
    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            self._check_integer(name, 1)
        self._check_integer("warmup", 0)
        self._check_integer("seed", 0)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            self._check_float(name, positive=name in _POSITIVE)
        if not (math.isfinite(self.dropout) and 0 <= self.dropout < 1):
            raise ParameterError("dropout", self.dropout, "a number from 0 to below 1")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ParameterError("min_lr", self.min_lr, f"at most lr = {self.lr}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParameterError(name, getattr(self, name), "one of " + ", ".join(choices))
        if not self.data:
            raise ParameterError("data", self.data, "at least one text file")
        self._check_mix()

    @property
    def floor(self) -> float:
        """The learning rate at the end, as a part of its peak."""
        return 0.1 if self.min_lr is None else self.min_lr / self.lr

    @property
    def last_step(self) -> int | None:
        """The number of steps, None where only the clock ends the run."""
        return _DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps

    def to_dict(self) -> dict[str, object]:
        """Plain values, in field order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainOptions:
        """The inverse of `to_dict`; lists become tuples.

        Raises:
            ParameterError: a key is unknown or a value out of range.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ParameterError("options", name, "one of " + ", ".join(names))
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)  # type: ignore[arg-type]

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and getattr(TrainOptions, name) is None:
            return
        if type(value) is not int or not least <= value < 2**31:
            raise ParameterError(name, value, f"an integer of at least {least}")

    def _check_float(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        if value is None and getattr(TrainOptions, name) is None:
            return
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            allowed = "a number above 0" if positive else "a number of at least 0"
            raise ParameterError(name, value, allowed)

    def _check_mix(self) -> None:
        if self.mix is None:
            return
        if len(self.mix) != len(self.data):
            allowed = f"as many weights as there are files in data ({len(self.data)})"
            raise ParameterError("mix", self.mix, allowed)
        if not all(math.isfinite(weight) and weight > 0 for weight in self.mix):
            raise ParameterError("mix", self.mix, "finite weights above 0")
